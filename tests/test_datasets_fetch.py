"""Downloads: whole, checked, atomic; against a server on the loopback."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import scpert
from scpert.errors import DownloadError, ScpertError
from scpert.resources._fetch import fetch, file_hash, provenance

BODY = b"gene\tterm\n" * 5000
SHA256 = hashlib.sha256(BODY).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/good"):
            body, length = BODY, len(BODY)
        elif self.path.startswith("/short"):  # announces more than it sends
            body, length = BODY[:1000], len(BODY)
        elif self.path.startswith("/stall"):
            self.server.release.wait(10)
            return
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    httpd.asked, httpd.release = [], threading.Event()
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.release.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(scpert.settings, "cache_dir", folder)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return folder


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


def test_right_file_once(server, cache):
    path = fetch(f"{server.url}/good", "terms.tsv", SHA256, subfolder="knowledge")
    assert path == cache / "knowledge" / "terms.tsv"
    assert path.read_bytes() == BODY
    assert fetch(f"{server.url}/good", "terms.tsv", SHA256, subfolder="knowledge") == path
    assert len(server.asked) == 1
    record = provenance(path)
    assert record["sha256"] == SHA256
    assert record["url"] == f"{server.url}/good"
    assert record["date"].endswith("+00:00")
    assert files(cache) == ["knowledge/terms.tsv", "knowledge/terms.tsv.provenance.json"]


def test_md5_is_checked_too(server, cache):
    fetch(f"{server.url}/good", "a.tsv", md5=hashlib.md5(BODY).hexdigest())
    with pytest.raises(DownloadError, match="its md5 is .* expected 0000"):
        fetch(f"{server.url}/good", "b.tsv", md5="0" * 32)


def test_wrong_hash_leaves_nothing(server, cache):
    with pytest.raises(DownloadError, match="not the file that was expected"):
        fetch(f"{server.url}/good", "terms.tsv", "0" * 64)
    assert files(cache) == []


def test_cut_off_leaves_nothing(server, cache):
    with pytest.raises(DownloadError, match="cut off; nothing was kept .*1000 bytes read"):
        fetch(f"{server.url}/short", "terms.tsv")
    assert files(cache) == []


def test_not_found_leaves_nothing(server, cache):
    with pytest.raises(DownloadError, match="answered 404"):
        fetch(f"{server.url}/nothing", "terms.tsv")
    assert files(cache) == []


def test_server_that_never_answers(server, cache):
    with pytest.raises(DownloadError, match="Cannot download"):
        fetch(f"{server.url}/stall", "terms.tsv", timeout=0.3)
    assert files(cache) == []


def test_server_down(cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match="Cannot download .* pass the file as path="):
        fetch(f"http://127.0.0.1:{port}/good", "terms.tsv")
    assert files(cache) == []


def test_failed_renewal_keeps_the_old_copy(server, cache):
    path = fetch(f"{server.url}/good", "terms.tsv")
    with pytest.raises(DownloadError, match="cut off"):
        fetch(f"{server.url}/short", "terms.tsv", "0" * 64)
    assert path.read_bytes() == BODY
    assert files(cache) == ["terms.tsv", "terms.tsv.provenance.json"]


@pytest.mark.parametrize("known", [SHA256, None])
def test_damaged_copy_is_downloaded_again(server, cache, known):
    path = fetch(f"{server.url}/good", "terms.tsv", known)
    path.write_bytes(BODY[:100])
    assert fetch(f"{server.url}/good", "terms.tsv", known).read_bytes() == BODY
    assert len(server.asked) == 2


def test_file_put_there_by_hand_is_used(server, cache):
    cache.mkdir()
    (cache / "terms.tsv").write_bytes(b"mine")
    assert fetch(f"{server.url}/good", "terms.tsv").read_bytes() == b"mine"
    assert server.asked == []
    assert provenance(cache / "terms.tsv") == {"sha256": hashlib.sha256(b"mine").hexdigest()}


def test_damaged_record_is_no_obstacle(server, cache):
    path = fetch(f"{server.url}/good", "terms.tsv")
    path.with_name("terms.tsv.provenance.json").write_text(json.dumps([1]))
    assert fetch(f"{server.url}/good", "terms.tsv").read_bytes() == BODY
    assert provenance(path) == {"sha256": SHA256}


def test_cache_that_is_no_folder(server, tmp_path, cache):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DownloadError, match="Cannot make the cache folder .* SCPERT_CACHE"):
        fetch(f"{server.url}/good", "terms.tsv")


@pytest.mark.parametrize("name", ["", "../terms.tsv", "a/b"])
def test_name_with_folders_is_refused(cache, name):
    with pytest.raises(ScpertError, match="plain file name"):
        fetch("http://127.0.0.1/x", name)


def test_file_hash(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_hash(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
