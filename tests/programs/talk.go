// Servers and clients as they are written in Go: non-blocking sockets behind blocking calls, deadlines, and io.Copy, which splices.
//
//	talk serve     echoes by io.Copy on port 9000 and line by line on 9001, and answers HTTP on 9002 with what it is sent
//	talk run HOST  talks to all three on eight connections each; prints what went wrong, and done
package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

func main() {
	switch os.Args[1] {
	case "serve":
		go serve(":9000", func(c net.Conn) {
			io.Copy(c, c)
			c.(*net.TCPConn).CloseWrite()
		})
		go serve(":9001", echoLines)
		http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			w.Write(body)
		})
		panic(http.ListenAndServe(":9002", nil))
	case "run":
		var wg sync.WaitGroup
		for i := 0; i < 8; i++ {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for _, port := range []string{"9000", "9001"} {
					if err := lines(os.Args[2] + ":" + port); err != nil {
						fmt.Println(port, err)
					}
				}
				if err := requests("http://" + os.Args[2] + ":9002/"); err != nil {
					fmt.Println("http", err)
				}
			}()
		}
		wg.Wait()
		fmt.Println("done")
	}
}

func serve(addr string, f func(net.Conn)) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		panic(err)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			panic(err)
		}
		go func() { defer c.Close(); f(c) }()
	}
}

func echoLines(c net.Conn) {
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return
		}
		c.Write(line)
	}
}

// Exchanges lines in turns, lets deadlines pass between them, and ends one way and then the other.
func lines(to string) error {
	c, err := net.Dial("tcp", to)
	if err != nil {
		return err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	for i := 0; i < 2000; i++ {
		want := bytes.Repeat([]byte{byte('a' + i%26)}, 100+i%900)
		want = append(want, '\n')
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write(want); err != nil {
			return fmt.Errorf("write %d: %w", i, err)
		}
		got, err := r.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("read %d: %w", i, err)
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("wrong at %d", i)
		}
		if i%500 == 499 {
			c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			if _, err := r.ReadByte(); !os.IsTimeout(err) {
				return fmt.Errorf("no timeout: %v", err)
			}
		}
	}
	c.SetDeadline(time.Now().Add(5 * time.Second))
	c.(*net.TCPConn).CloseWrite()
	_, err = r.ReadByte()
	if err != io.EOF {
		return fmt.Errorf("end: %v", err)
	}
	return nil
}

// Asks on one connection that is kept.
func requests(to string) error {
	client := &http.Client{Timeout: 5 * time.Second}
	for i := 0; i < 1000; i++ {
		want := bytes.Repeat([]byte{byte('a' + i%26)}, i%5000)
		resp, err := client.Post(to, "text/plain", bytes.NewReader(want))
		if err != nil {
			return err
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Equal(got, want) {
			return fmt.Errorf("request %d: %v", i, err)
		}
	}
	return nil
}
