// HTTP as Go's own libraries speak it. `serve PORT` answers HTTP/1 and HTTP/2 without TLS on one port; `ask HOST:PORT` has one conversation
// after the other with it, over both, and prints what each came to as a JSON object: the same, whatever is between the two.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/h2c"
	"golang.org/x/net/websocket"
)

// What was seen of requests by the name they go by, for who asks later.
var noted = struct {
	sync.Mutex
	of map[string]chan string
}{of: map[string]chan string{}}

func note(id string) chan string {
	noted.Lock()
	defer noted.Unlock()
	if noted.of[id] == nil {
		noted.of[id] = make(chan string, 16)
	}
	return noted.of[id]
}

func sum(data []byte) string { return fmt.Sprintf("%d %x", len(data), sha256.Sum256(data)) }

// What a mesh may add or make another of.
func told(header http.Header) string {
	var lines []string
	for name, values := range header {
		lower := strings.ToLower(name)
		if strings.HasPrefix(lower, "x-envoy-") || strings.HasPrefix(lower, "x-b3-") {
			continue
		}
		switch lower {
		case "date", "traceparent", "tracestate", "b3", "x-request-id", "x-forwarded-proto", "x-forwarded-client-cert", "server":
			continue
		// Answered and taken off by a proxy.
		case "expect":
			continue
		}
		// How the end of nothing is said differs.
		if lower == "content-length" && values[0] == "0" {
			continue
		}
		lines = append(lines, lower+"="+strings.Join(values, ","))
	}
	sort.Strings(lines)
	return strings.Join(lines, " ")
}

func serve(port string) {
	mux := http.NewServeMux()
	// What of a request there was.
	// As many headers as proxies usually let through, before they add their own.
	mux.HandleFunc("/many", func(w http.ResponseWriter, r *http.Request) {
		// No date beside them, and a length.
		w.Header()["Date"] = nil
		for i := 0; i < 98; i++ {
			w.Header().Set(fmt.Sprintf("x-%d", i), "v")
		}
		io.WriteString(w, "many")
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s [%s] body=%s err=%v trailer=[%s]\n", r.Method, r.RequestURI, r.Host, told(r.Header), sum(body), err, told(r.Trailer))
	})
	mux.HandleFunc("/status", func(w http.ResponseWriter, r *http.Request) {
		code, _ := strconv.Atoi(r.URL.Query().Get("code"))
		if length := r.URL.Query().Get("length"); length != "" {
			w.Header().Set("content-length", length)
		}
		w.Header()["X-Many"] = []string{"one", "two"}
		http.SetCookie(w, &http.Cookie{Name: "a", Value: "1"})
		http.SetCookie(w, &http.Cookie{Name: "b", Value: "2", Path: "/x", HttpOnly: true})
		w.WriteHeader(code)
	})
	mux.HandleFunc("/trailers", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("trailer", "x-sum, x-count")
		io.WriteString(w, strings.Repeat("body ", 1000))
		w.(http.Flusher).Flush()
		w.Header().Set("x-sum", "abc")
		w.Header().Set("x-count", "5000")
		w.Header().Set(http.TrailerPrefix+"x-unannounced", "yes")
	})
	mux.HandleFunc("/early", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("link")
		io.WriteString(w, "late")
	})
	// Sends so much when it is told to.
	mux.HandleFunc("/steps", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("content-type", "text/event-stream")
		go_on := note("steps-" + r.URL.Query().Get("id"))
		for step := range go_on {
			fmt.Fprintf(w, "data: %s\n\n", step)
			w.(http.Flusher).Flush()
			if step == "last" {
				return
			}
		}
	})
	mux.HandleFunc("/step", func(w http.ResponseWriter, r *http.Request) {
		note("steps-" + r.URL.Query().Get("id")) <- r.URL.Query().Get("say")
	})
	// Never ends, and notes that its client has gone.
	mux.HandleFunc("/forever", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "begun")
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
			note("gone-" + r.URL.Query().Get("id")) <- "gone"
		case <-time.After(20 * time.Second):
		}
	})
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
			note("gone-" + r.URL.Query().Get("id")) <- "gone"
		case <-time.After(20 * time.Second):
		}
	})
	mux.HandleFunc("/gone", func(w http.ResponseWriter, r *http.Request) {
		select {
		case what := <-note("gone-" + r.URL.Query().Get("id")):
			io.WriteString(w, what)
		case <-time.After(5 * time.Second):
			io.WriteString(w, "not heard of")
		}
	})
	mux.HandleFunc("/panic", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("begun") != "" {
			if r.URL.Query().Get("length") != "" {
				w.Header().Set("content-length", "100000")
			}
			io.WriteString(w, strings.Repeat("x", 5000))
			w.(http.Flusher).Flush()
		}
		panic(http.ErrAbortHandler)
	})
	// Refuses a body before it comes.
	mux.HandleFunc("/refuse", func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "not that", http.StatusRequestEntityTooLarge)
	})
	mux.HandleFunc("/large", func(w http.ResponseWriter, r *http.Request) {
		size, _ := strconv.Atoi(r.URL.Query().Get("size"))
		block := bytes.Repeat([]byte("0123456789abcdef"), 4096)
		for size > 0 {
			n := len(block)
			if n > size {
				n = size
			}
			if _, err := w.Write(block[:n]); err != nil {
				return
			}
			size -= n
		}
	})
	mux.HandleFunc("/headers", func(w http.ResponseWriter, r *http.Request) {
		size, _ := strconv.Atoi(r.URL.Query().Get("size"))
		w.Header().Set("x-large", strings.Repeat("v", size))
		io.WriteString(w, "large")
	})
	mux.HandleFunc("/form", func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseMultipartForm(1 << 20); err != nil {
			http.Error(w, err.Error(), 400)
			return
		}
		file, head, err := r.FormFile("file")
		if err != nil {
			http.Error(w, err.Error(), 400)
			return
		}
		data, _ := io.ReadAll(file)
		fmt.Fprintf(w, "%s %s %s", r.FormValue("field"), head.Filename, sum(data))
	})
	// Sends back what comes, while it comes.
	mux.HandleFunc("/duplex", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		block := make([]byte, 4096)
		for {
			n, err := r.Body.Read(block)
			w.Write(bytes.ToUpper(block[:n]))
			w.(http.Flusher).Flush()
			if err != nil {
				return
			}
		}
	})
	// What is neither HTTP nor a WebSocket.
	mux.HandleFunc("/shout", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("upgrade") != "shout/1" {
			http.Error(w, "no such protocol", http.StatusBadRequest)
			return
		}
		conn, buffered, err := w.(http.Hijacker).Hijack()
		if err != nil {
			http.Error(w, err.Error(), 500)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: shout/1\r\n\r\nhello\n")
		for {
			line, err := buffered.ReadString('\n')
			if err != nil {
				return
			}
			io.WriteString(conn, strings.ToUpper(line))
		}
	})
	mux.HandleFunc("/close", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("connection", "close")
		io.WriteString(w, "over")
	})
	mux.HandleFunc("/address", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "here") })
	mux.Handle("/ws", websocket.Server{Handler: func(ws *websocket.Conn) {
		for {
			var text string
			if websocket.Message.Receive(ws, &text) != nil {
				return
			}
			if text == "bye" {
				return
			}
			if len(text) > 100 {
				websocket.Message.Send(ws, []byte(sum([]byte(text))))
				continue
			}
			websocket.Message.Send(ws, "you said "+text)
		}
	}})
	// Hands on what comes to where it is told.
	mux.HandleFunc("/onward/", func(w http.ResponseWriter, r *http.Request) {
		target, _ := url.Parse("http://" + r.Header.Get("x-onward"))
		proxy := httputil.NewSingleHostReverseProxy(target)
		director := proxy.Director
		proxy.Director = func(r *http.Request) {
			director(r)
			r.Host = "talk.example"
			r.URL.Path = strings.TrimPrefix(r.URL.Path, "/onward")
			r.Header.Del("x-onward")
			r.Header["X-Forwarded-For"] = nil
		}
		proxy.ServeHTTP(w, r)
	})
	server := &http.Server{Handler: h2c.NewHandler(mux, &http2.Server{MaxConcurrentStreams: 250}), ErrorLog: log.New(io.Discard, "", 0), MaxHeaderBytes: 1 << 20}
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(server.Serve(listener))
}

// Who is asked, whatever the address is.
const base = "http://talk.example"

type asking struct {
	to      string
	one     *http.Client
	two     *http.Client
	results map[string]interface{}
}

func (a *asking) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, network, a.to)
}

// How a conversation failed, in words that do not tell addresses.
func failure(err error) string {
	var timeout net.Error
	switch {
	case err == nil:
		return ""
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	case errors.Is(err, context.Canceled):
		return "cancelled"
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "ended early"
	}
	var stream http2.StreamError
	if errors.As(err, &stream) {
		return "stream " + stream.Code.String()
	}
	if strings.HasSuffix(err.Error(), "EOF") || strings.Contains(err.Error(), "connection reset") {
		return "ended"
	}
	return err.Error()
}

func (a *asking) do(client *http.Client, method, path string, body io.Reader, change func(*http.Request)) []interface{} {
	request, err := http.NewRequest(method, base+path, body)
	if err != nil {
		return []interface{}{"no request", err.Error()}
	}
	if change != nil {
		change(request)
	}
	response, err := client.Do(request)
	if err != nil {
		return []interface{}{"failed", failure(err)}
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	text := string(data)
	if len(text) > 1000 {
		text = sum(data)
	}
	return []interface{}{response.StatusCode, told(response.Header), response.ContentLength, text, failure(err), told(response.Trailer)}
}

type counted struct{ n, size int }

// A body whose length is not known.
func (c *counted) Read(to []byte) (int, error) {
	if c.n >= c.size {
		return 0, io.EOF
	}
	n := len(to)
	if n > 5000 {
		n = 5000
	}
	if n > c.size-c.n {
		n = c.size - c.n
	}
	for i := 0; i < n; i++ {
		to[i] = byte('a' + (c.n+i)%26)
	}
	c.n += n
	return n, nil
}

func (a *asking) both(name string, f func(*http.Client) interface{}) {
	a.results["1 "+name] = f(a.one)
	a.results["2 "+name] = f(a.two)
}

func (a *asking) requests() {
	for _, method := range []string{"GET", "HEAD", "OPTIONS", "DELETE", "PROPFIND", "POST", "PUT", "PATCH"} {
		method := method
		a.both(method, func(c *http.Client) interface{} { return a.do(c, method, "/echo?a=1&a=2&b=%20x&c", nil, nil) })
		a.both(method+" with a body", func(c *http.Client) interface{} {
			return a.do(c, method, "/echo", strings.NewReader("a body"), nil)
		})
	}
	a.both("a body of unknown length", func(c *http.Client) interface{} { return a.do(c, "POST", "/echo", &counted{size: 123456}, nil) })
	a.both("an empty body of unknown length", func(c *http.Client) interface{} { return a.do(c, "POST", "/echo", &counted{}, nil) })
	a.both("trailers of a request", func(c *http.Client) interface{} {
		return a.do(c, "POST", "/echo", &counted{size: 10}, func(r *http.Request) {
			r.Trailer = http.Header{"X-Sum": {"abc"}, "X-Other": {"1"}}
		})
	})
	a.both("headers", func(c *http.Client) interface{} {
		return a.do(c, "GET", "/echo", nil, func(r *http.Request) {
			r.Header["X-Twice"] = []string{"one", "two, three"}
			r.Header.Set("x-empty", "")
			r.Header.Set("x-utf8", "grüße")
			r.Header.Set("accept-language", "de, en;q=0.5")
			r.Header.Set("authorization", "Basic dTpw")
			r.Header.Set("range", "bytes=0-10")
			r.Header.Set("if-none-match", "\"x\"")
			r.Header.Set("te", "trailers")
			r.Header.Set("x-forwarded-for", "192.0.2.7")
			r.AddCookie(&http.Cookie{Name: "a", Value: "1"})
			r.AddCookie(&http.Cookie{Name: "b", Value: "x=y"})
		})
	})
	a.both("another host", func(c *http.Client) interface{} {
		return a.do(c, "GET", "/echo", nil, func(r *http.Request) { r.Host = "shop.example:8443" })
	})
	a.both("headers of 30 KB", func(c *http.Client) interface{} {
		return a.do(c, "GET", "/echo", nil, func(r *http.Request) { r.Header.Set("x-large", strings.Repeat("v", 30_000)) })
	})
	// What proxies usually let through, before they add their own.
	a.both("headers of 60 KB", func(c *http.Client) interface{} {
		return a.do(c, "GET", "/echo", nil, func(r *http.Request) { r.Header.Set("x-large", strings.Repeat("v", 60*1024-300)) })
	})
	a.both("a hundred headers", func(c *http.Client) interface{} {
		return a.do(c, "GET", "/echo", nil, func(r *http.Request) {
			// The host and two of the library's are beside them.
			for i := 0; i < 97; i++ {
				r.Header.Set(fmt.Sprintf("x-%d", i), "v")
			}
		})
	})
	a.both("a hundred headers of an answer", func(c *http.Client) interface{} { return a.do(c, "GET", "/many", nil, nil) })
	a.both("a path of 8 KB", func(c *http.Client) interface{} { return a.do(c, "GET", "/echo?"+strings.Repeat("q", 8000), nil, nil) })
	a.both("a form with a file", func(c *http.Client) interface{} {
		var body bytes.Buffer
		form := multipart.NewWriter(&body)
		form.SetBoundary("boundary-of-the-form")
		form.WriteField("field", "a value")
		file, _ := form.CreateFormFile("file", "name.bin")
		io.Copy(file, &counted{size: 300_000})
		form.Close()
		return a.do(c, "POST", "/form", &body, func(r *http.Request) { r.Header.Set("content-type", form.FormDataContentType()) })
	})
	a.both("expect", func(c *http.Client) interface{} {
		return a.do(c, "POST", "/echo", &counted{size: 70_000}, func(r *http.Request) { r.Header.Set("expect", "100-continue") })
	})
	a.both("expect and be refused", func(c *http.Client) interface{} {
		return a.do(c, "POST", "/refuse", &counted{size: 70_000}, func(r *http.Request) { r.Header.Set("expect", "100-continue") })
	})
	a.both("be refused while sending", func(c *http.Client) interface{} {
		// What of it is sent before the answer is read differs.
		answer := a.do(c, "POST", "/refuse", &counted{size: 200_000}, nil)
		return answer[0]
	})
}

func (a *asking) answers() {
	for _, code := range []int{200, 201, 204, 205, 206, 304, 400, 404, 418, 429, 500, 503, 599} {
		path := fmt.Sprintf("/status?code=%d", code)
		a.both(path, func(c *http.Client) interface{} { return a.do(c, "GET", path, nil, nil) })
		if code == 204 || code == 304 {
			continue
		}
		a.both("HEAD "+path, func(c *http.Client) interface{} { return a.do(c, "HEAD", path+"&length=77", nil, nil) })
	}
	a.both("trailers of an answer", func(c *http.Client) interface{} { return a.do(c, "GET", "/trailers", nil, nil) })
	a.both("early hints", func(c *http.Client) interface{} {
		var hints []string
		trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
			hints = append(hints, fmt.Sprintf("%d %v", code, header["Link"]))
			return nil
		}}
		answer := a.do(c, "GET", "/early", nil, func(r *http.Request) { *r = *r.WithContext(httptrace.WithClientTrace(r.Context(), trace)) })
		return []interface{}{hints, answer}
	})
	for _, size := range []int{1, 16_384, 65_535, 65_536, 5_000_000} {
		path := fmt.Sprintf("/large?size=%d", size)
		a.both(path, func(c *http.Client) interface{} { return a.do(c, "GET", path, nil, nil) })
	}
	a.both("headers of 30 KB in an answer", func(c *http.Client) interface{} {
		answer := a.do(c, "GET", "/headers?size=30000", nil, nil)
		return []interface{}{answer[0], len(answer[1].(string)), answer[3]}
	})
	a.both("compressed", func(c *http.Client) interface{} {
		return a.do(c, "GET", "/echo", nil, func(r *http.Request) { r.Header.Set("accept-encoding", "gzip, br") })
	})
	for _, how := range []string{"", "?begun=1", "?begun=1&length=1"} {
		path := "/panic" + how
		a.both(path, func(c *http.Client) interface{} {
			answer := a.do(c, "POST", path, strings.NewReader("x"), nil)
			if how != "" {
				return answer
			}
			// What stands between answers for one who says nothing.
			return answer[0] != 200
		})
	}
}

func (a *asking) conversations() {
	a.both("steps", func(c *http.Client) interface{} {
		id := fmt.Sprint(time.Now().UnixNano())
		answers := make(chan *http.Response, 1)
		go func() {
			response, err := c.Get(base + "/steps?id=" + id)
			if err == nil {
				answers <- response
			}
		}()
		say := func(what string) { a.do(c, "POST", "/step?id="+id+"&say="+what, nil, nil) }
		say("first")
		var seen []string
		response := <-answers
		defer response.Body.Close()
		lines := bufio.NewScanner(response.Body)
		for lines.Scan() {
			if lines.Text() == "" {
				continue
			}
			// The next is only sent once this has been seen.
			seen = append(seen, lines.Text())
			if len(seen) < 5 {
				say(fmt.Sprint("step-", len(seen)))
			} else if len(seen) == 5 {
				say("last")
			}
		}
		return []interface{}{seen, failure(lines.Err())}
	})
	a.results["2 both ways at once"] = func() interface{} {
		reader, writer := io.Pipe()
		// A server of HTTP/1 waits for the end before it answers.
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		request, _ := http.NewRequestWithContext(ctx, "POST", base+"/duplex", reader)
		response, err := a.two.Do(request)
		if err != nil {
			return failure(err)
		}
		defer response.Body.Close()
		var heard []string
		answers := bufio.NewReader(response.Body)
		for i := 0; i < 20; i++ {
			fmt.Fprintf(writer, "line %d\n", i)
			line, err := answers.ReadString('\n')
			heard = append(heard, strings.TrimSpace(line)+failure(err))
		}
		writer.Close()
		rest, err := io.ReadAll(answers)
		return []interface{}{heard, string(rest), failure(err)}
	}()
	for _, path := range []string{"/forever", "/slow"} {
		a.both("leave "+path, func(c *http.Client) interface{} {
			id := fmt.Sprint(time.Now().UnixNano())
			ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			defer cancel()
			request, _ := http.NewRequestWithContext(ctx, "GET", base+path+"?id="+id, nil)
			response, err := c.Do(request)
			var got string
			if err == nil {
				data, err := io.ReadAll(response.Body)
				got = string(data) + " " + failure(err)
				response.Body.Close()
			} else {
				got = failure(err)
			}
			answer := a.do(c, "GET", "/gone?id="+id, nil, nil)
			return []interface{}{got, answer[3]}
		})
	}
	a.both("a hundred at once", func(c *http.Client) interface{} {
		var group sync.WaitGroup
		answers := make([]string, 100)
		for i := range answers {
			i := i
			group.Add(1)
			go func() {
				defer group.Done()
				answer := a.do(c, "POST", fmt.Sprintf("/echo?n=%d", i), &counted{size: 1000 * i}, nil)
				answers[i] = fmt.Sprint(answer)
			}()
		}
		group.Wait()
		return answers
	})
	a.both("through one more", func(c *http.Client) interface{} {
		return a.do(c, "POST", "/onward/echo?x=1", &counted{size: 5000}, func(r *http.Request) { r.Header.Set("x-onward", a.to) })
	})
}

func (a *asking) connections() {
	// One after the other, over connections that are kept.
	reused := func(path string) interface{} {
		transport := &http.Transport{DialContext: a.dial}
		defer transport.CloseIdleConnections()
		client := &http.Client{Transport: transport, Timeout: 10 * time.Second}
		var all []bool
		for i := 0; i < 5; i++ {
			trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { all = append(all, info.Reused) }}
			a.do(client, "GET", path, nil, func(r *http.Request) { *r = *r.WithContext(httptrace.WithClientTrace(r.Context(), trace)) })
		}
		return all
	}
	a.results["1 kept"] = reused("/address")
	a.results["1 kept after errors"] = reused("/status?code=500")
	a.results["1 closed by the server"] = a.do(a.one, "GET", "/close", nil, nil)
	raw := func(text string, more ...string) interface{} {
		conn, err := net.Dial("tcp", a.to)
		if err != nil {
			return err.Error()
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		io.WriteString(conn, text)
		reader := bufio.NewReader(conn)
		var all []string
		for i := 0; i < strings.Count(text, "HTTP/1."); i++ {
			response, err := http.ReadResponse(reader, nil)
			if err != nil {
				all = append(all, failure(err))
				break
			}
			data, err := io.ReadAll(response.Body)
			all = append(all, fmt.Sprint(response.StatusCode, " ", string(data), failure(err), response.Close))
		}
		if len(more) > 0 && more[0] == "end" {
			rest, err := io.ReadAll(reader)
			all = append(all, string(rest)+failure(err))
		}
		return all
	}
	a.results["1 pipelined"] = raw("GET /address HTTP/1.1\r\nhost: talk.example\r\n\r\nPOST /echo HTTP/1.1\r\nhost: talk.example\r\ncontent-length: 3\r\n\r\nabcGET /address HTTP/1.1\r\nhost: talk.example\r\n\r\n")
	a.results["1 HTTP/1.0"] = raw("GET /address HTTP/1.0\r\n\r\n", "end")
	a.results["1 HTTP/1.0 with a host"] = raw("GET /address HTTP/1.0\r\nhost: talk.example\r\n\r\n", "end")
	a.results["1 to be closed"] = raw("GET /address HTTP/1.1\r\nhost: talk.example\r\nconnection: close\r\n\r\n", "end")
	a.results["1 chunks with extensions"] = raw("POST /echo HTTP/1.1\r\nhost: talk.example\r\ntransfer-encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nx-late: 1\r\n\r\n")
	upgraded := func() interface{} {
		conn, err := net.Dial("tcp", a.to)
		if err != nil {
			return err.Error()
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		// What comes with the request is the other protocol's already.
		io.WriteString(conn, "GET /shout HTTP/1.1\r\nhost: shout.example\r\nconnection: upgrade\r\nupgrade: shout/1\r\n\r\nfirst\n")
		reader := bufio.NewReader(conn)
		response, err := http.ReadResponse(reader, nil)
		if err != nil {
			return failure(err)
		}
		var heard []string
		for _, line := range []string{"", "", "second\n", "third\n"} {
			io.WriteString(conn, line)
			answer, err := reader.ReadString('\n')
			heard = append(heard, answer+failure(err))
		}
		conn.(*net.TCPConn).CloseWrite()
		rest, err := io.ReadAll(reader)
		return []interface{}{response.StatusCode, response.Header.Get("upgrade"), heard, string(rest), failure(err)}
	}
	a.results["1 another protocol"] = upgraded()
	a.results["1 a protocol that is refused"] = a.do(a.one, "GET", "/shout", nil, func(r *http.Request) {
		r.Header.Set("connection", "upgrade")
		r.Header.Set("upgrade", "whisper/1")
	})
	socket := func() interface{} {
		conn, err := net.Dial("tcp", a.to)
		if err != nil {
			return err.Error()
		}
		config, err := websocket.NewConfig("ws://talk.example/ws", "http://origin.example/")
		if err != nil {
			return err.Error()
		}
		ws, err := websocket.NewClient(config, conn)
		if err != nil {
			return err.Error()
		}
		defer ws.Close()
		ws.SetDeadline(time.Now().Add(5 * time.Second))
		var heard []string
		for _, text := range []string{"hello", "", strings.Repeat("long ", 40_000), "again"} {
			websocket.Message.Send(ws, text)
			var answer string
			err := websocket.Message.Receive(ws, &answer)
			heard = append(heard, answer+failure(err))
		}
		websocket.Message.Send(ws, "bye")
		var answer string
		err = websocket.Message.Receive(ws, &answer)
		return []interface{}{heard, failure(err)}
	}
	a.results["1 WebSocket"] = socket()
}

func ask(to string) {
	a := &asking{to: to, results: map[string]interface{}{}}
	h2 := &http2.Transport{AllowHTTP: true, DialTLS: func(string, string, *tls.Config) (net.Conn, error) { return net.Dial("tcp", to) }}
	h1 := &http.Transport{DialContext: a.dial, ExpectContinueTimeout: 3 * time.Second, MaxIdleConnsPerHost: 100, MaxResponseHeaderBytes: 1 << 20}
	a.one = &http.Client{Transport: h1, Timeout: 15 * time.Second}
	a.two = &http.Client{Transport: h2, Timeout: 15 * time.Second}
	a.requests()
	a.answers()
	a.conversations()
	a.connections()
	if err := json.NewEncoder(os.Stdout).Encode(a.results); err != nil {
		log.Fatal(err)
	}
}

func main() {
	switch {
	case len(os.Args) == 3 && os.Args[1] == "serve":
		serve(os.Args[2])
	case len(os.Args) == 3 && os.Args[1] == "ask":
		ask(os.Args[2])
	default:
		log.Fatal("usage: http_talk serve PORT | ask HOST:PORT")
	}
}
