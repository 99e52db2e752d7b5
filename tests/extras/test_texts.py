"""The lesson: a text is fetched once, checked, and put where the commands find it."""
import hashlib
import http.server
import io
import threading
import zipfile

import pytest

from data import corpus
from data.corpus import load_text
from extras import texts
from tests.conftest import error_of, output_of


@pytest.fixture
def server(nowhere, monkeypatch):
    """A web server on this machine instead of the two sources.

    `server[path] = content, size` is what it sends.
    """
    files = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content, size = files.get(self.path, (None, 0))
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()  # looks for a shutdown
    base = f"http://127.0.0.1:{host.server_port}/"
    monkeypatch.setattr(texts, "PTB", base)
    monkeypatch.setattr(texts, "WIKITEXT", base + "wikitext.zip")
    monkeypatch.setattr(texts, "NAMES", ["wikitext-2-raw/wiki.test.raw", "ptb/ptb.valid.txt"])
    texts.fetch.cache_clear()
    yield files
    host.shutdown()


def archive(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as z:
        for name, text in files.items():
            z.writestr(name, text)
    return content.getvalue()


def published(name, content, monkeypatch):
    monkeypatch.setitem(corpus.SHA256, name, hashlib.sha256(content).hexdigest())


def fetched(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_texts_are_fetched_checked_and_found(server, nowhere, monkeypatch, capsys):
    """Of an archive one member is taken by its name, and nothing else is unpacked."""
    wiki, ptb = b" a \n", b" a b \n c \n"
    content = archive({"wikitext-2-raw/wiki.test.raw": wiki, "../outside": "never unpacked"})
    published("wikitext-2-raw/wiki.test.raw", wiki, monkeypatch)
    published("ptb/ptb.valid.txt", ptb, monkeypatch)
    server.update({"/wikitext.zip": (content, len(content)), "/ptb.valid.txt": (ptb, len(ptb))})
    assert "downloading  http://127.0.0.1" in output_of(texts.main, "there", capsys)
    assert fetched(nowhere) == ["ptb.valid.txt", "wiki.test.raw"]
    assert load_text("ptb", "test", "there")[0] == "a b\n\nc" and load_text("wikitext2", "test", "there")[0] == " a \n"
    server.clear()
    assert output_of(texts.main, "there", capsys) == "2 texts in there\n"  # nothing is fetched twice


@pytest.mark.parametrize("content, size, message", [
    (b"wrong", 5, "not the published ptb/ptb.valid.txt: 5 bytes of SHA-256"),
    (b"cut", 50, "did not give ptb/ptb.valid.txt .*put the file there as DIR/ptb/ptb.valid.txt"),
    (None, 0, "did not give ptb/ptb.valid.txt .*404")])
def test_a_wrong_or_cut_download_is_never_kept(content, size, message, server, nowhere, monkeypatch):
    server["/ptb.valid.txt"] = content, size
    with pytest.raises(OSError, match=message):
        texts.download("ptb/ptb.valid.txt")
    assert fetched(nowhere) == []


def test_a_bad_archive_is_one_line(server, nowhere, monkeypatch, capsys):
    server["/wikitext.zip"] = b"no archive", 10
    assert "wikitext.zip did not give wikitext-2-raw/wiki.test.raw" in error_of(texts.main, "there", monkeypatch, capsys)
    assert fetched(nowhere) == []
