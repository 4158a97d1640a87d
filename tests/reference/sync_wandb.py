"""Uploads a run's offline run with W&B's own client to a server on loopback, and compares what arrives with the run's files.

    python sync_wandb.py RUN_DIR

Each line of `metrics.jsonl` must arrive once, each grid of `samples/` byte for byte at its step, and `config.toml` as the
run's configuration. The server answers the client's requests as W&B's does, as far as the client reads them.
"""

import glob
import gzip
import json
import math
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

EACH = {"loss", "lr", "grad_norm", "samples_per_second"}


class Uploads:
    """What a client uploaded."""

    def __init__(self):
        self.run = {}
        self.rows = {}
        self.files = {}
        self.summary = {}
        self.exit_code = None


def handler(uploads):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def body(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def answer(self, value):
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer({})

        def do_PUT(self):
            uploads.files[self.path.removeprefix("/upload/")] = self.body()
            self.answer({})

        def do_POST(self):
            body = self.body()
            if self.path == "/graphql":
                self.answer({"data": self.query(json.loads(body))})
                return
            if self.path.endswith("/file_stream"):
                self.stream(json.loads(body))
            self.answer({})

        def stream(self, sent):
            history = sent.get("files", {}).get("wandb-history.jsonl")
            if history:
                for number, line in enumerate(history["content"], history["offset"]):
                    uploads.rows[number] = json.loads(line)
            summary = sent.get("files", {}).get("wandb-summary.json")
            if summary:
                uploads.summary = json.loads(summary["content"][-1])
            uploads.exit_code = sent.get("exitcode", uploads.exit_code)

        def query(self, query):
            text, variables = query["query"], query.get("variables") or {}
            host = self.headers["Host"]
            if "upsertBucket" in text:
                uploads.run.update({key: value for key, value in variables.items() if value is not None})
                project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "user"}}
                bucket = {"id": "b", "name": variables["name"], "displayName": "d", "description": "", "config": "{}",
                          "sweepName": None, "historyLineCount": 0, "project": project}
                return {"upsertBucket": {"bucket": bucket, "inserted": True}}
            if "createRunFiles" in text:
                files = [{"name": name, "uploadUrl": f"http://{host}/upload/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            if "viewer" in text:
                viewer = {"id": "v", "entity": "user", "username": "user", "flags": "{}", "teams": {"edges": []}}
                return {"viewer": viewer}
            return {"model": {"bucket": None}}

        def log_message(self, *_):
            pass

    return Handler


def sync(folder):
    uploads = Uploads()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(uploads))
    # The client closes connections without waiting for their end.
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_ERROR_REPORTING": "false",
    }
    command = [sys.executable, "-m", "wandb", "sync", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    return uploads, done.stdout + done.stderr


def equal(one, other):
    # A number that is not finite is `null` in metrics.jsonl. A step that was written again was read from metrics.jsonl, which
    # may change its last bit.
    return math.isnan(one) if other is None else math.isclose(one, other, rel_tol=1e-15)


def main():
    (run,) = sys.argv[1:]
    with open(os.path.join(run, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    grids = {}
    for path in glob.glob(os.path.join(run, "samples", "step-*.png")):
        step, name = re.fullmatch(r"step-(\d+)-(\w+)\.png", os.path.basename(path)).groups()
        with open(path, "rb") as file:
            grids[f"validation/{name}", int(step)] = file.read()
    assert lines and grids, f"{run}: no steps or no grids"

    folders = glob.glob(os.path.join(run, "wandb", "offline-run-*"))
    assert len(folders) == 1, folders
    uploads, said = sync(folders[0])

    rows = [uploads.rows[number] for number in sorted(uploads.rows)]
    assert [row["_step"] for row in rows] == [line["step"] for line in lines], [row["_step"] for row in rows]
    for row, line in zip(rows, lines):
        for key in EACH | ({"endpoint_error"} & line.keys()):
            assert equal(row[key], line[key]), f"step {line['step']}: {key} {row[key]}, {line[key]}"
        assert row["_timestamp"] > 1.7e9 and row["_runtime"] >= 0, row
    times = [row["_timestamp"] for row in rows]
    assert times == sorted(times), times

    pictures = {
        (key, row["_step"]): uploads.files[value["path"]]
        for row in rows
        for key, value in row.items()
        if isinstance(value, dict) and value.get("_type") == "image-file"
    }
    assert pictures == grids, f"{sorted(pictures)}, {sorted(grids)}"

    with open(os.path.join(run, "config.toml"), "rb") as file:
        # The client leaves empty tables out.
        wanted = {table: keys for table, keys in tomllib.load(file).items() if keys}
    config = {key: item["value"] for key, item in json.loads(uploads.run["config"]).items() if key != "_wandb"}
    # A resumed run may have another number of steps; the run's configuration is that of its first process.
    for settings in (wanted, config):
        settings["train"].pop("max_steps")
    different = {table for table in config.keys() | wanted.keys() if config.get(table) != wanted.get(table)}
    assert not different, {table: (config.get(table), wanted.get(table)) for table in different}
    assert uploads.run["project"] == wanted["track"]["wandb"], uploads.run
    assert equal(uploads.summary["loss"], lines[-1]["loss"]), uploads.summary
    assert uploads.exit_code == 0, said
    print(f"{len(rows)} rows, {len(pictures)} pictures")


main()
