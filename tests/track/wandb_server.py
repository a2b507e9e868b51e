"""A stand-in for the W&B service: answers what the client asks and keeps what it is sent."""

import gzip
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Reached at `url`; keeps `requests` as (path, body) and `history` rows by line number."""

    def __init__(self):
        self.requests, self.history, self.complete = [], {}, []
        self.silent_after_history = False
        self.bucket = {}  # the last UpsertBucket's variables
        self.known = None  # what the service answers about a run it knows: {"historyLineCount", "summary"}
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def _answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                server.requests.append((self.path, body.decode(errors="replace")))
                answer = json.dumps(server.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = _answer

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def answer(self, path, body):
        if self.silent_after_history and self.history:
            time.sleep(60)
        if path.endswith("/file_stream"):
            message = json.loads(body)
            for name, part in (message.get("files") or {}).items():
                if "history" in name:
                    for i, line in enumerate(part["content"]):
                        self.history[part["offset"] + i] = json.loads(line)
            self.complete += [message["complete"]] if message.get("complete") else []
            return {}
        if not path.endswith("/graphql"):
            return {}
        message = json.loads(body)
        query, variables = message["query"], message.get("variables") or {}
        run = {"id": "UnVu", "name": variables.get("name") or "run", "displayName": "a run"}
        run["project"] = {"name": "project", "entity": {"name": "entity"}}
        if "upsertBucket" in query:
            self.bucket |= {key: value for key, value in variables.items() if value is not None}
            return {"data": {"upsertBucket": {"bucket": run, "inserted": self.known is None}}}
        if re.search(r"createRunFiles", query):
            files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}}
        if "RunResumeStatus" in query:
            bucket = self.known and run | self.known
            return {"data": {"model": {"id": "m", "name": "project", "bucket": bucket}}}
        if "createArtifact(" in query:
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
            return {"data": {"createArtifact": {"artifact": artifact}}}
        if "viewer" in query.lower():
            return {"data": {"viewer": {"id": "v", "entity": "entity", "username": "u", "flags": "{}"}}}
        return {"data": {"project": None}}

    def close(self):
        self._http.shutdown()
        self._http.server_close()
