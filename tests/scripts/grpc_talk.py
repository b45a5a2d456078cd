"""gRPC as its own library speaks it: a server with one method of each kind, and a client that reports what each call came to.

`serve PORT`, or `ask HOST:PORT`, which prints one JSON object, what came of each call by its name.
"""

import json
import sys
import threading
import time
from concurrent import futures

import grpc

PLAIN = {"request_serializer": None, "response_deserializer": None}
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
cancelled = threading.Event()


def echo(request, context):
    sent = dict(context.invocation_metadata())
    context.send_initial_metadata((("x-initial", "1"), ("x-got", sent.get("x-sent", "-"))))
    context.set_trailing_metadata((("x-trailing", "2"), ("x-binary-bin", b"\x00\xff" + sent.get("x-sent-bin", b""))))
    return request


def fail(request, context):
    context.set_trailing_metadata((("x-why", "because"), ("grpc-status-details-bin", b"\x08\x05details")))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now: 50% ünready\n")


def fail_late(request, context):
    yield b"one"
    context.abort(grpc.StatusCode.DATA_LOSS, "lost")


def slow(request, context):
    context.add_callback(lambda: cancelled.set())
    time.sleep(3)
    return request


def count(request, context):
    for n in range(int(request)):
        yield str(n).encode()


def total(requests, context):
    return str(sum(int(r) for r in requests)).encode()


def reply(requests, context):
    for r in requests:
        yield b"re: " + r


def forever(request, context):
    context.add_callback(lambda: cancelled.set())
    while context.is_active():
        yield b"tick"
        time.sleep(0.02)


def was_cancelled(request, context):
    seen = cancelled.wait(2)
    cancelled.clear()
    return b"yes" if seen else b"no"


def overloaded(request, context):
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much")


def serve(port):
    unary = {"Echo": echo, "Fail": fail, "Slow": slow, "WasCancelled": was_cancelled, "Overloaded": overloaded}
    streams = {"Count": count, "FailLate": fail_late, "Forever": forever}
    methods = {name: grpc.unary_unary_rpc_method_handler(f) for name, f in unary.items()}
    methods.update({name: grpc.unary_stream_rpc_method_handler(f) for name, f in streams.items()})
    methods["Total"] = grpc.stream_unary_rpc_method_handler(total)
    methods["Reply"] = grpc.stream_stream_rpc_method_handler(reply)
    options = UNLIMITED + [("grpc.http2.min_ping_interval_without_data_ms", 10), ("grpc.http2.max_ping_strikes", 0)]
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=64), options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("talk.Talk", methods),))
    server.add_insecure_port(f"[::]:{port}")
    server.start()
    server.wait_for_termination()


def own(metadata):
    """What the other end's program says; in an answer without messages there is also what a proxy adds to any answer."""
    told = [(k, v if isinstance(v, str) else v.hex()) for k, v in metadata or ()]
    return sorted((k, v) for k, v in told if k != "date" and not k.startswith("x-envoy-"))


def said(error):
    trailing = own(error.trailing_metadata())
    return [error.code().name, error.details(), trailing]


def attempt(call):
    try:
        return call()
    except grpc.RpcError as error:
        return said(error)


def ask(to):
    options = UNLIMITED + [("grpc.keepalive_time_ms", 500), ("grpc.http2.max_pings_without_data", 0), ("grpc.enable_retries", 0)]
    channel = grpc.insecure_channel(to, options=options)
    unary = lambda name: channel.unary_unary(f"/talk.Talk/{name}", **PLAIN)
    stream = lambda name: channel.unary_stream(f"/talk.Talk/{name}", **PLAIN)
    out = {}

    def run(name, call):
        out[name] = attempt(call)

    def echoed():
        call = unary("Echo").with_call(b"hello", timeout=10, metadata=(("x-sent", "a"), ("x-sent-bin", b"\x01\x02")))
        answer, call = call
        return [answer.decode(), call.code().name, own(call.initial_metadata()), own(call.trailing_metadata())]

    def large(size):
        answer = unary("Echo")(bytes(i % 251 for i in range(1000)) * (size // 1000), timeout=20)
        return [len(answer), answer[:3].hex()]

    def late():
        got = []
        try:
            for message in stream("FailLate")(b"", timeout=10):
                got.append(message.decode())
        except grpc.RpcError as error:
            return got + said(error)
        return got

    def compressed():
        call = channel.unary_unary("/talk.Talk/Echo", **PLAIN)
        return len(call(b"a" * 100_000, timeout=10, compression=grpc.Compression.Gzip))

    def ping_pong():
        sent, answers = futures.ThreadPoolExecutor(1), []
        got = threading.Semaphore(1)

        def messages():
            for n in range(100):
                got.acquire()
                yield str(n).encode()

        for answer in channel.stream_stream("/talk.Talk/Reply", **PLAIN)(messages(), timeout=20):
            answers.append(answer)
            got.release()
        return [len(answers), answers[-1].decode()]

    def cancel():
        call = stream("Forever")(b"", timeout=20)
        first = next(call).decode()
        call.cancel()
        return [first, unary("WasCancelled")(b"", timeout=10).decode()]

    def deadline():
        began = time.monotonic()
        result = attempt(lambda: unary("Slow")(b"", timeout=0.3))
        early = time.monotonic() - began < 1.5
        return [result[0], early, unary("WasCancelled")(b"", timeout=10).decode()]

    def many():
        with futures.ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(lambda n: unary("Echo")(str(n).encode(), timeout=20).decode(), range(400)))
        return answers == [str(n) for n in range(400)]

    def idle():
        time.sleep(1.5)
        return unary("Echo")(b"still", timeout=10).decode()

    run("unary", echoed)
    run("failed", lambda: unary("Fail")(b"", timeout=10))
    run("failed late", late)
    run("unimplemented", lambda: unary("Nothing")(b"", timeout=10))
    run("exhausted", lambda: unary("Overloaded")(b"", timeout=10))
    run("server stream", lambda: sum(int(m) for m in stream("Count")(b"1000", timeout=20)))
    run("empty stream", lambda: len(list(stream("Count")(b"0", timeout=20))))
    run("client stream", lambda: channel.stream_unary("/talk.Talk/Total", **PLAIN)((str(n).encode() for n in range(1000)), timeout=20).decode())
    run("ping pong", ping_pong)
    run("empty", lambda: len(unary("Echo")(b"", timeout=10)))
    run("large", lambda: large(3_000_000))
    run("compressed", compressed)
    run("deadline", deadline)
    run("cancelled", cancel)
    run("many at once", many)
    run("kept alive", idle)
    print(json.dumps(out))


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "serve" else ask(sys.argv[2])
