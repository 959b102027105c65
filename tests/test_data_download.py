"""Downloads: checked, resumed, unpacked whole or not at all; from a server of the test's own."""

import errno
import hashlib
import io
import queue
import random
import re
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from kernelnorm.experiments import files
from kernelnorm.experiments.data import DATASETS, disk, download, load_images
from kernelnorm.experiments.errors import DataError

PUBLISHED = dict(DATASETS)  # before the fixture puts the tests' own Imagenette in its place

needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="files have no locks there")


def tar(members):
    """A .tgz of ``members``: name to content, or to a ``TarInfo``'s type and target."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                archive.addfile(info)
    return buffer.getvalue()


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(buffer, "png")
    return buffer.getvalue()


GOOD = tar(
    {
        "imagenette2-160/train/n01/a.png": png("red"),
        "imagenette2-160/train/n02/b.png": png("green"),
        "imagenette2-160/val/n02/c.png": png("blue"),
        "imagenette2-160/notes.csv": random.Random(0).randbytes(1 << 19),
    }
)


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.content``; the first ``server.breaks`` answers stop half way."""

    def do_GET(self):
        server = self.server
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        server.requests.append((self.path, start))
        if server.status or start >= len(server.content):
            return self.send_error(server.status or 416)
        rest = server.content[start if server.ranges else 0 :]
        self.send_response(206 if server.ranges else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        broken = len(server.requests) <= server.breaks
        self.wfile.write(rest[: len(rest) // 2] if broken else rest)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.requests = GOOD, []
        server.breaks, server.ranges, server.status = 0, True, None
        server.url = f"http://127.0.0.1:{server.server_port}/imagenette2-160.tgz"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def table(monkeypatch, tmp_path):
    """Imagenette as the tests serve it, nothing on the network, no waiting between attempts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    for name in DATASETS:
        monkeypatch.setenv(f"KERNELNORM_{name.upper()}_URL", "http://127.0.0.1:9/nothing")
    publish(monkeypatch, GOOD)


def publish(monkeypatch, content):
    md5 = hashlib.md5(content).hexdigest()
    counts = {"train_images": 2, "test_images": 1, "classes": 2}
    entry = replace(DATASETS["imagenette"], md5=md5, megabytes=0, image_size=16, **counts)
    monkeypatch.setitem(download.DATASETS, "imagenette", entry)


def load(tmp_path, split="train", **kwargs):
    return load_images("imagenette", split, data_dir=tmp_path / "data", **kwargs)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "url", "md5", "counts"),
    [
        (
            "cifar10",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            (50000, 10000, 10),
        ),
        (
            "imagenette",
            "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
            "e793b78cc4c9e9a4ccc0c1155377a412",
            (9469, 3925, 10),
        ),
        (
            "imagewoof",
            "https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-320.tgz",
            "0f46d997ec2264e97609196c95897a44",
            (9025, 3929, 10),
        ),
    ],
)
def test_published_checksums(name, url, md5, counts):
    dataset = PUBLISHED[name]
    assert (dataset.url, dataset.md5) == (url, md5)
    assert (dataset.train_images, dataset.test_images, dataset.classes) == counts
    assert set(PUBLISHED) == {"cifar10", "imagenette", "imagewoof"}


def test_downloaded_once_then_used_from_the_folder(server, tmp_path):
    train = load(tmp_path, url=server.url)
    assert train.pixels.shape == (2, 3, 16, 16)
    assert train.classes == ("n01", "n02")
    assert load(tmp_path, "test", download=False).labels.tolist() == [1]
    assert names(tmp_path / "data") == ["imagenette2-160", "imagenette2-160.tgz"]
    assert server.requests == [("/imagenette2-160.tgz", 0)]


def test_archive_that_is_there_is_unpacked(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "imagenette2-160.tgz").write_bytes(GOOD)
    assert len(load(tmp_path, download=False)) == 2


def test_url_from_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELNORM_IMAGENETTE_URL", server.url)
    assert len(load(tmp_path)) == 2


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_download_is_resumed_or_restarted(server, tmp_path, ranges):
    server.breaks, server.ranges = 2, ranges
    assert len(load(tmp_path, url=server.url)) == 2
    starts = [start for _, start in server.requests]
    assert len(starts) == 3
    assert 0 == starts[0] < starts[1]
    assert names(tmp_path / "data") == ["imagenette2-160", "imagenette2-160.tgz"]


def test_download_that_keeps_breaking_goes_on_the_next_time(server, tmp_path):
    server.breaks = 3
    with pytest.raises(DataError, match=r"cannot download imagenette from .*has arrived is kept"):
        load(tmp_path, url=server.url)
    assert names(tmp_path / "data") == ["imagenette2-160.tgz.part"]
    assert len(load(tmp_path, url=server.url)) == 2
    assert server.requests[3][1] > 0
    assert names(tmp_path / "data") == ["imagenette2-160", "imagenette2-160.tgz"]


def test_process_killed_after_the_last_byte(server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "imagenette2-160.tgz.part").write_bytes(GOOD)
    assert len(load(tmp_path, url=server.url)) == 2
    assert len(server.requests) == 1


def test_process_killed_while_it_checks_the_md5(server, tmp_path, monkeypatch):
    def killed(file):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download, "_md5", killed)
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path, url=server.url)
    assert names(tmp_path / "data") == ["imagenette2-160.tgz.part"]
    assert len(load(tmp_path, url=server.url)) == 2
    assert [start for _, start in server.requests] == [0, len(GOOD)]


@pytest.fixture
def messages(monkeypatch):
    """What is said while waiting for a lock."""
    messages = queue.Queue()
    monkeypatch.setattr(disk.tqdm, "write", lambda text, file: messages.put(text))
    return messages


def test_of_two_processes_one_downloads_and_unpacks(server, tmp_path, monkeypatch, messages):
    unpacked, unpack = [], download._unpack
    monkeypatch.setattr(download, "_unpack", lambda *a: (unpacked.append(a), unpack(*a))[1])
    with ThreadPoolExecutor() as pool:
        with disk.locked(tmp_path / "data" / "imagenette2-160"):
            both = [pool.submit(load, tmp_path, url=server.url) for _ in range(2)]
            for _ in both:
                assert re.match("waiting for another process.*2-160$", messages.get(timeout=60))
            assert server.requests == []
        assert [len(train.result()) for train in both] == [2, 2]
    assert len(server.requests) == len(unpacked) == 1
    assert names(tmp_path / "data") == ["imagenette2-160", "imagenette2-160.tgz"]


def test_lock_goes_from_one_process_to_the_next(tmp_path, messages):
    inside, leave = threading.Event(), threading.Event()

    def second():
        with disk.locked(tmp_path / "folder"):
            inside.set()
            assert leave.wait(60)

    def third():
        with disk.locked(tmp_path / "folder"):
            return leave.is_set()

    with ThreadPoolExecutor() as pool:
        with disk.locked(tmp_path / "folder"):
            waiting = pool.submit(second)
            messages.get(timeout=60)
        assert inside.wait(60)
        newcomer = pool.submit(third)
        messages.get(timeout=60)
        leave.set()
        waiting.result()
        assert newcomer.result()
    assert names(tmp_path) == []


def test_folder_that_is_not_all_there(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "imagenette2-160.tgz").write_bytes(GOOD)
    load(tmp_path)
    assert capsys.readouterr().err == ""
    folder = tmp_path / "data" / "imagenette2-160"
    (folder / "train" / "n02" / "b.png").rename(folder / "train" / "n01" / "b.png")
    (folder / "train" / "n02").rmdir()
    load(tmp_path)
    message = r"warning: .*train has 2 images of 1 classes, but imagenette was .* 2 of 2: results"
    assert re.match(message, capsys.readouterr().err)
    (folder / "train" / "n02").mkdir()
    (folder / "train" / "n01" / "b.png").rename(folder / "train" / "n02" / "b.png")
    (folder / "val" / "n02" / "d.png").write_bytes(png("blue"))
    load(tmp_path, "test")
    message = r"warning: .*val has 2 images of 2 classes, but imagenette was .* with 1 of 2"
    assert re.match(message, capsys.readouterr().err)


def test_wrong_half_is_fetched_again_from_the_start(server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "imagenette2-160.tgz.part").write_bytes(b"something else")
    assert len(load(tmp_path, url=server.url)) == 2
    assert [start for _, start in server.requests] == [14, 0]


def test_wrong_content(server, tmp_path):
    server.content = b"<html>Sign in to the hotel's network</html>"
    with pytest.raises(DataError, match=r"from http://127.* is not imagenette: the md5 of .*tgz"):
        load(tmp_path, url=server.url)
    assert names(tmp_path / "data") == []


def test_wrong_archive_in_the_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "imagenette2-160.tgz").write_bytes(GOOD[:-1])
    with pytest.raises(DataError, match=r"tgz is broken or another version: its md5 is .* Delete"):
        load(tmp_path)


def test_nothing_there_and_no_download(tmp_path):
    message = r"imagenette is not in .*data: expected the archive imagenette2-160\.tgz.*fetch http"
    with pytest.raises(DataError, match=message):
        load(tmp_path, download=False)
    assert not (tmp_path / "data").exists()


def test_server_that_answers_with_an_error(server, tmp_path):
    server.status = 404
    message = "cannot download .*404.*KERNELNORM_IMAGENETTE_URL.* by hand"
    with pytest.raises(DataError, match=message):
        load(tmp_path, url=server.url)


def test_empty_answer(server, tmp_path):
    server.content = b""
    with pytest.raises(DataError, match="is not imagenette"):
        load(tmp_path, url=server.url)


def test_no_server(tmp_path):
    with pytest.raises(DataError, match=r"cannot download imagenette from http://127.0.0.1:9/noth"):
        load(tmp_path)


def test_no_space_for_the_download(server, tmp_path, monkeypatch):
    usage = disk.shutil.disk_usage(tmp_path)._replace(free=-1)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"no disk space in .*data: .* are needed"):
        load(tmp_path, url=server.url)
    assert server.requests == []


def test_a_part_that_has_arrived_needs_no_space(server, tmp_path, monkeypatch):
    part = tmp_path / "data" / "imagenette2-160.tgz.part"
    part.parent.mkdir()
    part.write_bytes(GOOD[:400_000])
    table = download.DATASETS
    monkeypatch.setitem(table, "imagenette", replace(table["imagenette"], megabytes=1))
    usage = disk.shutil.disk_usage(tmp_path)._replace(free=700_000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    assert len(load(tmp_path, url=server.url)) == 2
    assert server.requests[0][1] == 400_000


def test_an_answer_that_is_far_too_long_is_cut_off(server, tmp_path):
    server.content = bytes(3_000_000)
    with pytest.raises(DataError, match=r"is not imagenette: it has more than 1 MB\. Try again"):
        load(tmp_path, url=server.url)
    assert names(tmp_path / "data") == []


def test_read_only_data_folder(server, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(disk.os, "access", lambda path, _: path != tmp_path / "data")
    assert len(load(tmp_path, url=server.url)) == 2
    assert len(load(tmp_path, download=False)) == 2
    assert names(tmp_path / "data") == []
    assert names(tmp_path / "home" / "kernelnorm") == ["imagenette2-160", "imagenette2-160.tgz"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("../outside.png", b"x"),
        ("imagenette2-160/../../outside.png", b"x"),
        ("/outside.png", b"x"),
        ("elsewhere/outside.png", b"x"),
        ("imagenette2-160/link", (tarfile.SYMTYPE, "/")),
        ("imagenette2-160/hard", (tarfile.LNKTYPE, "../outside.png")),
        ("imagenette2-160/pipe", (tarfile.FIFOTYPE, "")),
    ],
)
def test_hostile_archive_writes_nothing(tmp_path, monkeypatch, name, content):
    archive = tar({"imagenette2-160/train/n01/a.png": png("red"), name: content})
    publish(monkeypatch, archive)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "imagenette2-160.tgz").write_bytes(archive)
    with pytest.raises(DataError, match=rf"holds '{name}', which is not a plain file or folder in"):
        load(tmp_path)
    assert names(tmp_path / "data") == ["imagenette2-160.tgz"]
    assert not list(tmp_path.rglob("outside*"))


@needs_locks
def test_what_a_killed_process_leaves_is_removed(tmp_path, messages):
    script = """
import sys
from pathlib import Path
from kernelnorm.experiments.data import disk
from kernelnorm.experiments.files import replacing

target = Path(sys.argv[1])
with disk.locked(target), replacing(target) as folder:
    folder.mkdir()
    print("ready", flush=True)
    sys.stdin.read()
"""
    target = tmp_path / "folder"

    def found():
        with disk.locked(target):
            return names(tmp_path)

    with (
        ThreadPoolExecutor() as pool,
        subprocess.Popen(
            [sys.executable, "-c", script, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other,
    ):
        assert other.stdout.readline().strip() == b"ready"
        waiting = pool.submit(found)
        assert messages.get(timeout=60)
        part, lock = names(tmp_path)
        assert re.fullmatch(r"\.folder\.\w{8}\.part", part)
        assert lock == ".lock-folder"
        other.kill()
        assert waiting.result() == [".lock-folder"]
    assert names(tmp_path) == []


@needs_locks
def test_disk_that_cannot_lock(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    (tmp_path / ".folder.01234567.part").mkdir()  # another process may be writing to it
    with disk.locked(tmp_path / "folder"):
        pass
    assert names(tmp_path) == [".folder.01234567.part"]


@needs_locks
def test_unpacking_leaves_an_archive_that_is_being_downloaded(tmp_path):
    (tmp_path / "folder.tgz.part").touch()
    (tmp_path / ".folder.01234567.part").mkdir()
    with disk.locked(tmp_path / "folder"):
        assert names(tmp_path) == [".lock-folder", "folder.tgz.part"]
