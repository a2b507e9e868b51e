"""A stand-in for the W&B service: answers what the client asks and keeps what it is sent, like the real one.

A run is known by its name. Its history is rows by their number, its summary the last one sent; both are told
to a client that resumes it.
"""

import gzip
import json
import re
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Reached at `url`. `requests` are all as (path, body), `runs` what is known of each run by its name."""

    def __init__(self):
        self.requests, self.runs, self.artifacts, self.complete = [], {}, [], []
        self.silent_after_history = False
        self.delay_s = 0.0  # before every answer
        self.refuse = lambda path: None  # the status to answer a request with; None: as it should be
        self.taken = lambda path: None  # called with what was asked taken in, and its answer not sent yet
        self.bucket = {}  # the last UpsertBucket's variables
        self.port = 0
        self.start()

    @property
    def history(self):
        """Rows of the only run, by their number."""
        (run,) = self.runs.values()
        return run["history"]

    @property
    def rows(self):
        return [self.history[i] for i in sorted(self.history)]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        """Listen, on the same port as before."""
        self._open = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self._http.daemon_threads = True
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        """Break every connection and take no more."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    close = stop

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def setup(self):
                super().setup()
                server._open.add(self.connection)

            def handle(self):
                with suppress(ConnectionError):  # of a client that was killed
                    super().handle()

            def finish(self):
                server._open.discard(self.connection)
                with suppress(OSError):
                    super().finish()

            def _answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                server.requests.append((self.path, body.decode(errors="replace")))
                time.sleep(server.delay_s)
                status = None if self.path == "/count" else server.refuse(self.path)
                answer = {} if status else server.answer(self.path, body)
                answer = json.dumps(answer).encode()
                server.taken(self.path)
                with suppress(OSError):
                    self.send_response(status or 200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            do_GET = do_POST = do_PUT = _answer

        return Handler

    def answer(self, path, body):
        if path == "/count":  # not the service's: for those who wait
            return {"rows": sum(len(run["history"]) for run in self.runs.values())}
        if self.silent_after_history and any(run["history"] for run in self.runs.values()):
            time.sleep(60)
        if path.endswith("/file_stream"):
            return self._stream(path.split("/")[-2], json.loads(body))
        if not path.endswith("/graphql"):
            return {}
        message = json.loads(body)
        query, variables = message["query"], message.get("variables") or {}
        run = {"id": "UnVu", "name": variables.get("name") or "run", "displayName": "a run"}
        run["project"] = {"name": "project", "entity": {"name": "entity"}}
        if "upsertBucket" in query:
            self.bucket |= {key: value for key, value in variables.items() if value is not None}
            new = run["name"] not in self.runs
            self.runs.setdefault(run["name"], {"history": {}, "summary": "{}", "config": "{}"})
            if variables.get("config"):
                self.runs[run["name"]]["config"] = variables["config"]
            return {"data": {"upsertBucket": {"bucket": run, "inserted": new}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}}
        if "RunResumeStatus" in query:
            known = self.runs.get(variables["name"])
            bucket = known and run | self._status(known)
            return {"data": {"model": {"id": "m", "name": "project", "bucket": bucket}}}
        if "createArtifact(" in query:
            self.artifacts.append(variables.get("input", variables))
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
            return {"data": {"createArtifact": {"artifact": artifact}}}
        if re.search("viewer", query, re.IGNORECASE):
            return {"data": {"viewer": {"id": "v", "entity": "entity", "username": "u", "flags": "{}"}}}
        return {"data": {"project": None}}

    def _stream(self, name, message):
        for file, part in (message.get("files") or {}).items():
            if "history" in file:
                rows = enumerate(part["content"], part["offset"])
                self.runs[name]["history"] |= {number: json.loads(line) for number, line in rows}
            if "summary" in file:
                self.runs[name]["summary"] = part["content"][-1]
        self.complete += [message["complete"]] if message.get("complete") else []
        return {}

    def _status(self, known):
        """What the service tells a client that resumes a run."""
        history = known["history"]
        tail = [json.dumps(history[max(history)])] if history else []
        return {
            "historyLineCount": len(history), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]",
            "historyTail": json.dumps(tail), "summaryMetrics": known["summary"], "config": known["config"],
            "wandbConfig": '{"t": 1}', "tags": [],
        }  # fmt: skip
