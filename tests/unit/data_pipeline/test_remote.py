"""Data behind URLs: fetched once, retried, resumed from, and counted when they stay away."""

import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

import data_pipeline.remote as remote
from data_pipeline.__main__ import main
from data_pipeline.addresses import check_password, hidden_of
from data_pipeline.cli import exit_code
from data_pipeline.dataset import open_dataset
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.hub import only_kept
from data_pipeline.names import source_names
from data_pipeline.reader import PairLoader
from data_pipeline.remote import cached_file
from data_pipeline.shard_builder import BuildOptions, build
from data_pipeline.source import parse_source
from data_pipeline.stages import RecordReader


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; ``failures`` requests fail first, and ``log`` counts the rest."""

    def do_GET(self):
        self.server.log.append(self.path)
        if self.server.failures > 0:
            self.server.failures -= 1
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """(folder, base URL, server)."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.failures, server.log = 0, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(cached_file, "__kwdefaults__", {**cached_file.__kwdefaults__, "sleep": lambda _: None})


@pytest.fixture
def shards(tmp_path, served, jsonl, make_rows):
    build(
        [str(jsonl(tmp_path / "a.jsonl", make_rows(40)))],
        served[0] / "pairs",
        BuildOptions(shard_size=10, shuffle_seed=1),
    )
    return served[0] / "pairs"


def ids(dataset, tokenizer, **options):
    loader = PairLoader(
        dataset, Encoder(tokenizer), **({"seed": 3, "global_batch_size": 8, "micro_batch_size": 4} | options)
    )
    return [batch.ids for batch in loader], loader


def test_a_built_folder_behind_a_url(served, shards, cache, tokenizer):
    _, base, server = served
    dataset = open_dataset(f"{base}/pairs", cache_dir=cache)
    assert dataset.fingerprint == open_dataset(str(shards)).fingerprint
    assert not [path for path in server.log if path.endswith(".tar")], "shards are fetched when they are read"
    far, loader = ids(dataset, tokenizer, shuffle_shards=0)
    near, _ = ids(open_dataset(str(shards)), tokenizer)
    assert far == near
    assert not loader.faults
    fetched = len(server.log)
    assert ids(open_dataset(f"{base}/pairs/", cache_dir=cache), tokenizer, shuffle_shards=0)[0] == near
    assert not [path for path in server.log[fetched:] if path.endswith(".tar")], "shards come from the cache"


def test_remote_shards_are_shuffled_in_groups_by_default(served, shards, cache, tokenizer):
    dataset = open_dataset(f"{served[1]}/pairs", cache_dir=cache)
    loader = PairLoader(dataset, Encoder(tokenizer), seed=0, global_batch_size=8, micro_batch_size=8)
    assert loader.options.shuffle_shards == 8
    # with the one that is ready and the one being made, three batches: less than a shard of 10 records
    one = PairLoader(
        dataset, Encoder(tokenizer), seed=0, global_batch_size=2, micro_batch_size=2, shuffle_shards=1, prefetch=1
    )
    next(iter(one))
    assert len([path for path in served[2].log if path.endswith(".tar")]) == 1


def test_shards_without_index_and_files(served, shards, cache, tokenizer, jsonl, make_rows):
    folder, base, _ = served
    by_list = open_dataset(f"{base}/pairs/shard-{{00000..00003}}.tar", cache_dir=cache)
    by_glob = open_dataset(f"{base}/pairs/*.tar", cache_dir=cache)
    assert by_list.fingerprint == by_glob.fingerprint == open_dataset(str(shards)).fingerprint
    jsonl(folder / "more.jsonl", make_rows(5))
    assert len(open_dataset(f"{base}/more.jsonl", cache_dir=cache)) == 5
    with pytest.raises(DataError, match="matches nothing"):
        open_dataset(f"{base}/pairs/none*.tar", cache_dir=cache)
    with pytest.raises(DataError, match=r"is no folder made by.*manifest\.json does not exist"):
        open_dataset(f"{base}/nowhere", cache_dir=cache)


def test_failures_are_retried_with_growing_pauses(served, shards, cache):
    _, base, server = served
    server.failures, pauses = 3, []
    path = cached_file(f"{base}/pairs/shard-00000.tar", cache, backoff=0.5, sleep=pauses.append)
    assert path.read_bytes() == (shards / "shard-00000.tar").read_bytes()
    assert pauses == [0.5, 1.0, 2.0]
    server.failures = 99
    with pytest.raises(DataError, match="unreachable after 2 attempts"):
        cached_file(f"{base}/pairs/shard-00001.tar", cache, retries=2, sleep=pauses.append)
    assert not list(cache.rglob("*.partial"))


def test_a_copy_of_the_wrong_length_is_fetched_again(served, shards, cache):
    url = f"{served[1]}/pairs/shard-00000.tar"
    path = cached_file(url, cache)
    size = path.stat().st_size
    path.write_bytes(b"half")
    assert cached_file(url, cache, size=size).stat().st_size == size
    with pytest.raises(DataError, match=f"{size} bytes came, 5 expected"):
        cached_file(url, cache, size=5, fresh=True, retries=1)


def test_a_shard_that_stays_away_is_faults_and_tried_once(served, shards, cache, tokenizer):
    _, base, server = served
    dataset = open_dataset(f"{base}/pairs", cache_dir=cache)
    (shards / "shard-00002.tar").unlink()
    _, loader = ids(dataset, tokenizer, max_fault_fraction=1.0)
    assert loader.faults == {"missing_shard": 10}
    assert sum(path.endswith("shard-00002.tar") for path in server.log) <= 2  # fsspec asks for the size first


def test_processes_that_ask_at_once_fetch_once(served, shards, cache):
    _, base, server = served
    before = len(server.log)
    url = f"{base}/pairs/shard-00000.tar"
    threads = [threading.Thread(target=cached_file, args=(url, cache)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(server.log) - before == 1


def test_any_protocol_of_fsspec(shards, cache, tokenizer):
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/bucket/pairs/{path.name}", path.read_bytes())
    far, _ = ids(open_dataset("memory://bucket/pairs", cache_dir=cache), tokenizer, shuffle_shards=0)
    assert far == ids(open_dataset(str(shards)), tokenizer)[0]
    assert len(open_dataset("memory://bucket/pairs/shard-0000?.tar", cache_dir=cache)) == 40


def test_a_missing_protocol_package_is_named(cache, monkeypatch):
    def no_package(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "open", no_package)
    with pytest.raises(DataError, match=r"Install s3fs.*pip install s3fs"):
        open_dataset("s3://bucket/pairs.jsonl", cache_dir=cache)


@pytest.mark.parametrize("failures", [4, 9])  # each attempt makes a HEAD, answered, and GETs, refused while they last
def test_a_busy_server_is_asked_again_also_when_it_refuses_the_first_question(served, tmp_path, monkeypatch, failures):
    """fsspec reports 503 to its first question as FileNotFoundError: not to be taken for an absent file."""
    folder, base, _ = served
    (folder / "a.jsonl").write_text("x\n")
    answers = [0]

    def refuse(handler):
        answers[0] += 1
        if answers[0] <= failures:
            handler.send_error(503)
        elif handler.command == "HEAD":
            SimpleHTTPRequestHandler.do_HEAD(handler)
        else:
            SimpleHTTPRequestHandler.do_GET(handler)

    monkeypatch.setattr(Handler, "do_HEAD", refuse, raising=False)
    monkeypatch.setattr(Handler, "do_GET", refuse)
    if failures == 4:
        assert cached_file(f"{base}/a.jsonl", tmp_path / "c").read_text() == "x\n"
    else:
        with pytest.raises(DataError, match=r"unreachable after 3 attempts.*503"):
            cached_file(f"{base}/a.jsonl", tmp_path / "c", retries=3)


def test_an_absent_file_is_asked_for_once_and_a_dead_host_is_not_called_absent(served, tmp_path):
    pauses = []
    with pytest.raises(DataError, match="does not exist"):
        cached_file(f"{served[1]}/nope", tmp_path, sleep=pauses.append)
    assert not pauses
    with pytest.raises(DataError, match="unreachable after 3 attempts"):
        cached_file("http://127.0.0.1:9/a.jsonl", tmp_path, retries=3, sleep=pauses.append)
    assert len(pauses) == 2
    with pytest.raises(DataError, match="unreachable after 2 attempts"):
        cached_file("http://127.0.0.1:9/a.jsonl?token=x", tmp_path, retries=2, sleep=pauses.append)


def test_no_file_and_no_line_has_the_secrets_of_an_address(served, shards, jsonl, make_rows, cache, tmp_path, capsys):
    folder, base, _ = served
    jsonl(folder / "a.jsonl", [*make_rows(3), {"prompt": "", "chosen": "a", "rejected": "b"}])
    shutil.copy(next(shards.glob("*.tar")), folder / "b.tar")
    secret = base.replace("://", "://alice:sw0rdfish@")
    for name in ("a.jsonl?X-Amz-Signature=s1gn&token=t0ken", "b.tar?sig=s1gn", "b.tar"):
        dataset = open_dataset(f"{secret}/{name}", cache_dir=cache)
        assert RecordReader(dataset)(0).meta["source"] in ("a", "b", "x")
    build([f"{secret}/a.jsonl?sig=s1gn"], tmp_path / "out", BuildOptions())
    code = exit_code(main, ["verify", f"{secret}/b.tar", "--cache_dir", str(cache), "--json", str(tmp_path / "v.json")])
    code += exit_code(main, ["inspect", f"{secret}/no.jsonl?sig=s1gn", "--cache_dir", str(cache)])
    out = "".join(capsys.readouterr())
    assert code == 2 and "***@" in out and "does not exist" in out
    written = [path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents]
    assert len(written) > 5
    for word in ("sw0rdfish", "s1gn", "t0ken"):
        assert word not in out and not [path for path in written if word.encode() in path.read_bytes()]


def test_an_error_that_repeats_the_address_without_its_protocol_has_no_secrets():
    url = "s3://AKIA:sw0rdfish@bucket/pairs.jsonl"
    assert hidden_of(url, f'{url}: no bucket is named "AKIA:sw0rdfish@bucket"').count("sw0rdfish") == 0


def test_an_address_is_no_model_and_its_password_is_not_shown():
    with pytest.raises(DataError, match="an address is none") as caught:
        only_kept("https://alice:sw0rdfish@host/model")
    assert "sw0rdfish" not in str(caught.value)


def test_a_folder_built_anew_behind_its_url_is_fetched_anew(served, tmp_path, jsonl, make_rows):
    """Tars are padded to 10 kB: the new shards have the length of the cached ones."""
    source, folder, cache = str(jsonl(tmp_path / "b.jsonl", make_rows(12))), served[0] / "f", tmp_path / "c"
    for seed in (1, 2):
        build([source], folder, BuildOptions(shard_size=6, shuffle_seed=seed))
        dataset = open_dataset(f"{served[1]}/f", cache_dir=cache)
        reader = RecordReader(dataset)
        assert len({reader(number).id for number in range(12)}) == 12
        shutil.rmtree(folder)


def test_a_side_of_a_split_folder_behind_a_url_may_be_absent_but_not_out_of_reach(
    served, tmp_path, jsonl, make_rows, cache, monkeypatch
):
    folder, base, _ = served
    build([str(jsonl(tmp_path / "a.jsonl", make_rows(40)))], folder / "pairs", BuildOptions(eval_fraction=0.3))
    other = str(jsonl(tmp_path / "b.jsonl", make_rows(5, start=50)))
    count = len(open_dataset(f"{base}/pairs", cache_dir=cache))

    def refuse(handler):
        if "/eval/" in handler.path:
            handler.send_error(503)
        else:
            SimpleHTTPRequestHandler.do_GET(handler)

    with monkeypatch.context() as patched:
        patched.setattr(Handler, "do_GET", refuse)
        with pytest.raises(DataError, match=r"eval/manifest\.json is unreachable"):
            open_dataset([f"{base}/pairs", other], cache_dir=cache)
    shutil.rmtree(folder / "pairs" / "eval")
    assert len(open_dataset([f"{base}/pairs", other], cache_dir=cache)) == count + 5


def test_files_behind_urls(served, jsonl, make_rows, cache, tmp_path):
    """Lists of files that are no shards, addresses with a query; a folder without index is refused in one line."""
    folder, base, _ = served
    for number in range(2):
        jsonl(folder / f"part-{number}.jsonl", make_rows(5, start=5 * number))
    for way in ("part-{0,1}.jsonl", "part-{0..1}.jsonl?download=true", "{part-0,part-1}.jsonl", "part-*.jsonl"):
        dataset = open_dataset(f"{base}/{way}", cache_dir=cache)
        assert [RecordReader(dataset)(number).id for number in range(len(dataset))] == [f"r{i}" for i in range(10)]
    (address,) = source_names(f"{base}/part-0.jsonl?columns=a%2Cb")
    assert len(open_dataset(address, cache_dir=cache)) == 5
    assert served[2].log[-1].split("?")[1] in ("columns=a,b", "columns=a%2Cb")
    assert build([f"{base}/part-0.jsonl?download=true"], tmp_path / "out", BuildOptions())["num_records"] == 5
    for ways in ("{a,b}", "folder"):
        with pytest.raises(DataError, match="is no folder made by"):
            open_dataset(f"{base}/{ways}", cache_dir=cache)
    with pytest.raises(DataError, match="to build from a folder behind a URL, name its files or shards"):
        build([f"{base}/folder"], tmp_path / "other", BuildOptions())


@pytest.mark.parametrize(
    "url",
    ["https://u:p@ss/sw0rdfish@host/x.jsonl", "https://u:p/a@sw0rdfish@host/x.tar", "s3://u:p@h/x@sw0rdfish.jsonl"],
)
def test_a_password_whose_end_cannot_be_told_is_refused_and_not_shown(url):
    with pytest.raises(DataError, match="write @ and / of a password") as caught:
        parse_source(url)
    assert "sw0rdfish" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("https://u:p@host/x.jsonl", "https://u@host/x@y.jsonl", "https://u:p@s@host/x.jsonl", "s3://bucket/x.jsonl"),
        *("hf://datasets/a/b@rev/x@y.jsonl", "https://host/x.jsonl?a=b@c@d", "https://host:80/a@b/c@d.jsonl"),
    ],
)
def test_other_addresses_are_as_before(url):
    check_password(url)
