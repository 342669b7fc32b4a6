"""Pairs and images at URLs: fetched whole, kept, asked anew when they change, and mistakes in one line."""

import contextlib
import functools
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from PIL import Image

from tests.runs import final_bytes
from vapr.data import remote
from vapr.data.images import read_image
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.errors import UserError
from vapr.training import trainer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four pairs about a picture beside them."""
    place = tmp_path / "site"
    (place / "pictures").mkdir(parents=True)
    Image.effect_noise((56, 40), 60).convert("RGB").save(place / "pictures" / "my cat 100%.png")
    write_pairs(place / "pairs.jsonl", rows_about("pictures/my cat 100%.png"))
    return place


def rows_about(image: str, name: str = "row") -> list[dict]:
    return [
        {"id": f"{name}-{n}", "images": [image], "prompt": "What is it?", "chosen": f"A cat {n}.", "rejected": "A dog."}
        for n in range(4)
    ]


def put_in_memory(folder: Path, place: str) -> str:
    fsspec.filesystem("memory").put(str(folder), f"/{place}", recursive=True)
    return f"memory://{place}"


class Site(SimpleHTTPRequestHandler):
    """Serves a folder, counts requests, and breaks off the first answers if it is told to."""

    requests: ClassVar[list[str]] = []
    to_break = 0

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        Site.requests.append(self.path)
        if Site.to_break:
            Site.to_break -= 1
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
            return
        super().do_GET()


@pytest.fixture
def site(folder) -> Iterator[str]:
    """Address of a server of that folder on this machine."""
    Site.requests, Site.to_break = [], 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Site, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_pairs_at_a_url_are_those_of_the_file(folder, site):
    local = read_pairs(folder / "pairs.jsonl")
    for address in (put_in_memory(folder, "bucket/set"), site, f"file://{folder}"):
        pairs = read_pairs(f"{address}/pairs.jsonl")
        assert pairs.digest == local.digest and len(pairs) == 4
        pair = pairs[2]
        assert read_image(pair.images[0]).tobytes() == read_image(local[2].images[0]).tobytes()
        assert pair.where == f"{folder if address.startswith('file') else address}/pairs.jsonl:3"


def test_a_picture_is_fetched_when_it_is_read_and_once(folder, site):
    pairs = read_pairs(f"{site}/pairs.jsonl")
    assert Site.requests == ["/pairs.jsonl"]
    for pair in [*pairs, *read_pairs(f"{site}/pairs.jsonl")]:
        read_image(pair.images[0])
    assert Site.requests == ["/pairs.jsonl", "/pictures/my%20cat%20100%25.png"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "tar"])
def test_every_kind_of_file_in_folders_and_globs(folder, kind):
    import tarfile

    import datasets

    rows = rows_about("memory://bucket/set/pictures/my cat 100%.png")
    for part in ("train-00000", "train-00001", "test-00000"):
        named = [{**row, "id": f"{part}-{row['id']}"} for row in rows]
        file = folder / "data" / f"{part}.{kind}"
        file.parent.mkdir(exist_ok=True)
        if kind == "jsonl":
            write_pairs(file, named)
        elif kind == "json":
            file.write_text(json.dumps(named))
        elif kind == "parquet":
            datasets.Dataset.from_list(named).to_parquet(str(file))
        else:
            (folder / "one.json").write_text(json.dumps({k: v for k, v in named[0].items() if k != "images"}))
            with tarfile.open(file, "w") as tar:
                tar.add(folder / "one.json", f"{part}.json")
                tar.add(folder / "pictures" / "my cat 100%.png", f"{part}.png")
    url = put_in_memory(folder, "bucket/set")
    each = 1 if kind == "tar" else 4
    assert len(read_pairs(f"{url}/data")) == 2 * each  # the shards of split train alone
    assert not list((remote._folder()).rglob("test-*"))
    assert len(read_pairs(f"{url}/data/train-*1.{kind}")) == each
    fsspec.filesystem("memory").rm(f"/bucket/set/data/train-00001.{kind}")
    assert len(read_pairs(f"{url}/data")) == each
    assert read_image(read_pairs(f"{url}/data")[0].images[0]).size == (56, 40)


def test_a_file_that_changed_is_fetched_again_and_its_size_is_said(folder, site, capsys):
    url = f"{site}/pairs.jsonl"
    read_pairs(url)
    assert f"fetch      {url}: 0.0 MiB into " in capsys.readouterr().out
    read_pairs(url)
    assert "fetch" not in capsys.readouterr().out
    write_pairs(
        folder / "pairs.jsonl", rows_about("pictures/my cat 100%.png") + rows_about("pictures/my cat 100%.png", "more")
    )
    assert len(read_pairs(url)) == 8 and Site.requests == ["/pairs.jsonl"] * 2


def test_without_a_network_what_was_fetched_is_used(folder, capsys, monkeypatch):
    url = put_in_memory(folder, "bucket/set") + "/pairs.jsonl"
    read_pairs(url)

    def unreachable(*arguments, **options):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", unreachable)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "isdir", unreachable)
    assert len(read_pairs(url)) == 4
    assert "cannot be read (Name or service not known); what was fetched before is used" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"memory://other/pairs.jsonl: cannot be read \(Name or service not known\)"):
        read_pairs("memory://other/pairs.jsonl")


def test_a_transfer_that_breaks_off_is_tried_again_and_leaves_no_half_file(folder, site):
    Site.to_break = 2
    assert len(read_pairs(f"{site}/pairs.jsonl")) == 4
    Site.to_break = 99
    shutil.rmtree(remote._folder())
    with pytest.raises(UserError, match=r"pairs.jsonl: cannot be read \(.*bytes"):
        read_pairs(f"{site}/pairs.jsonl")
    assert not [
        file
        for file in remote._folder().rglob("*")
        if file.is_file() and "pairs" in file.name and file.suffix != ".lock"
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://nowhere/pairs.jsonl", "memory://nowhere/pairs.jsonl: no such file or folder"),
        ("memory://nowhere/*.jsonl", "memory://nowhere/*.jsonl: no such file or folder"),
        ("nosuch://bucket/pairs.jsonl", "nosuch://bucket/pairs.jsonl: fsspec knows no nosuch://"),
        ("s3://bucket/pairs.jsonl", "s3://bucket/pairs.jsonl: reading s3:// needs the package s3fs; pip install s3fs"),
        ("gs://bucket/pairs.jsonl", "needs the package gcsfs; pip install gcsfs"),
        ("file:///nowhere/pairs.jsonl", "/nowhere/pairs.jsonl: no such file or folder"),
    ],
)
def test_mistakes_are_one_line(source, message, monkeypatch):
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)  # as on a machine without it
    with pytest.raises(UserError) as error:
        read_pairs(source)
    assert str(error.value).startswith(message) or message in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_an_absent_file_of_a_server(site):
    with pytest.raises(UserError, match=r"/other.jsonl: no such file \(HTTP 404 File not found\)"):
        read_pairs(f"{site}/other.jsonl")


@pytest.mark.parametrize("error", [PermissionError("Forbidden"), RuntimeError("Unable to locate credentials")])
def test_missing_credentials_say_where_they_are_looked_for(monkeypatch, error):
    def refuse(*arguments):
        raise error

    monkeypatch.setattr(remote, "_file_system", refuse)
    with pytest.raises(
        UserError, match=r"s3://bucket/pairs.jsonl: .*; credentials: AWS_ACCESS_KEY_ID and .*aws configure"
    ):
        read_pairs("s3://bucket/pairs.jsonl")


def test_a_disk_without_room_is_noticed_before_anything_is_fetched(folder, monkeypatch):
    url = put_in_memory(folder, "bucket/set") + "/pairs.jsonl"
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match=r"bucket/set/pairs.jsonl: 0.0 MiB do not fit .*; XDG_CACHE_HOME names another"):
        read_pairs(url)


def test_an_image_root_at_a_url_holds_all_images(folder, tmp_path):
    url = put_in_memory(folder, "bucket/set")
    inside, outside = "my cat 100%.png", "memory://bucket/secret.png"
    write_pairs(tmp_path / "local.jsonl", [*rows_about(inside)[:1], *rows_about(f"{url}/pictures/{inside}", "url")[:1]])
    pairs = read_pairs(tmp_path / "local.jsonl", image_root=f"{url}/pictures")
    assert [read_image(pair.images[0]).size for pair in pairs] == [(56, 40)] * 2
    for image in (outside, "../../secret.png", "/etc/hostname"):
        write_pairs(tmp_path / "local.jsonl", rows_about(image))
        with pytest.raises(UserError, match=r"lies outside data.image_root \(memory://bucket/set/pictures\)"):
            read_pairs(tmp_path / "local.jsonl", image_root=f"{url}/pictures")


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/a//b/c.png", "http://host:80/a%20b/c d.png", "hf://datasets/o/n/x.jsonl", "https://h/" + "x" * 400 + ".png", "https://h/p.jsonl?token=%2F"],
)  # fmt: skip
def test_a_place_in_the_cache_leads_back_to_its_url(url):
    place = remote.local_place(url)
    assert remote.is_remote(place) and remote.url_of(place) == url
    assert all(len(part.encode()) < 256 for part in place.parts)
    assert place.suffix == (".jsonl" if ".jsonl" in url else ".png")


def test_training_from_urls_ends_with_the_bytes_of_training_from_files(make_config, folder, site, tmp_path):
    optim = {"lr": 1e-3, "pairs_per_step": 2, "epochs": 1}
    runs = {}
    for name, source in {"files": str(folder / "pairs.jsonl"), "urls": f"{site}/pairs.jsonl"}.items():
        config = make_config(name, data={"train": source, "workers": 1}, optim=optim)
        trainer.train(config)
        runs[name] = final_bytes(config)
    assert runs["files"] == runs["urls"]


def test_an_image_that_is_not_there_is_a_bad_row(make_config, folder, tmp_path):
    write_pairs(folder / "pairs.jsonl", [*rows_about("pictures/my cat 100%.png"), *rows_about("gone.png", "gone")[:1]])
    url = put_in_memory(folder, "bucket/set")
    data = {"train": f"{url}/pairs.jsonl", "workers": 0}
    with pytest.raises(
        UserError, match=r"memory://bucket/set/pairs.jsonl:5: .*memory://bucket/set/gone.png: no such file"
    ):
        trainer.train(make_config(data=data))
    config = make_config("skipped", data={**data, "on_bad_row": "skip"})
    trainer.train(config)
    assert list(json.loads((Path(config.run_dir) / "skipped.json").read_text())) == [f"{url}/pairs.jsonl:5"]


def test_ranks_wait_for_the_one_that_fetches(folder, site):
    """Four processes that open the same file at once: one transfer."""
    import multiprocessing

    barrier = multiprocessing.get_context("fork").Barrier(4)

    def open_it() -> None:
        barrier.wait()
        with contextlib.redirect_stdout(None):
            assert len(read_pairs(f"{site}/pairs.jsonl")) == 4

    processes = [multiprocessing.get_context("fork").Process(target=open_it) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert Site.requests == ["/pairs.jsonl"]
