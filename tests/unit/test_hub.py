"""A Hub that is down, or has no such name: what is said, and the exit code that a scheduler acts on."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import active_children
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import tiktoken

from titan_dp import config
from titan_dp.data.sources import load_hugging_face, rows_of
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.data.workers import read_in_workers
from titan_dp.errors import RunError, UserError, report, run_main


class Hub(BaseHTTPRequestHandler):
    """Answers every request with `status`; 0 resets the connection."""

    status = 503

    def do_GET(self) -> None:
        if not self.status:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        self.send_response(self.status)
        if self.status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a `Hub`, which Hugging Face's clients and tiktoken take for theirs; nobody waits between two tries."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiktoken.load.read_file(f"{address}/{name}"))
    huggingface_hub.close_session()
    yield address
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


NAMES: dict[str, Callable[[], Any]] = {
    "a tokenizer of the Hub": lambda: load_tokenizer("nobody/has-this"),
    "a tiktoken encoding": lambda: load_tokenizer("gpt2"),
    "a dataset": lambda: load_hugging_face("nobody/has-this", "", "train", "text", True),
}


SAID = {  # what the Hub answers: the exit code, what is said and what is not
    503: (1, ["503", "this may pass: try the same command again\n"], ["Traceback"]),
    404: (2, [], ["Traceback"]),
    0: (1, ["Connection reset by peer"], ["another rank", "Traceback"]),
}


@pytest.mark.parametrize("status", SAID)
@pytest.mark.parametrize("what", NAMES)
def test_what_may_pass_is_worth_another_try_and_what_is_not_there_the_users_mistake(
    hub: str, what: str, status: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Hub, "status", status)
    code, words, others = SAID[status]
    assert run_main(NAMES[what]) == code
    said = capfd.readouterr().err
    assert all(word in said for word in words), said
    assert not any(word in said for word in others), said


def test_working_offline_is_a_choice_that_no_other_try_changes(
    hub: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run_main(NAMES["a tokenizer of the Hub"]) == 2
    assert "another try" not in capfd.readouterr().err


def cut(worker: int, workers: int) -> Iterator[Any]:
    """Two items, then the connection is gone."""

    def rows() -> Iterator[Any]:
        yield 8
        raise ConnectionResetError(104, "Connection reset by peer")

    yield 7
    yield from rows_of(rows(), "some/dataset")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_breaks_off_says_which_and_why_from_a_worker_too(workers: int) -> None:
    others = set(active_children())  # of other tests
    items = read_in_workers(cut, config.Dataloader(num_workers=workers))
    assert [next(items), next(items)] == [7, 8]
    with pytest.raises(RunError) as raised:
        next(items)
    assert report(raised.value) == 1
    assert str(raised.value) == (
        "Hugging Face dataset 'some/dataset' cannot be read on (ConnectionResetError: [Errno 104] Connection reset by peer); "
        "the same command goes on once it can"
    )
    assert set(active_children()) <= others, "the end of the process would wait for a worker"


def mistaken(worker: int, workers: int) -> Iterator[int]:
    yield 0
    raise UserError("data.hf_dataset 'x' holds no documents in split 'train'")


def test_a_users_mistake_found_by_a_worker_stays_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main(lambda: sum(read_in_workers(mistaken, config.Dataloader(num_workers=1)))) == 2
    assert capfd.readouterr().err == "error: data.hf_dataset 'x' holds no documents in split 'train'\n"


def test_a_connection_that_breaks_anywhere_else_is_one_sentence_too(capfd: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        try:
            raise ConnectionResetError(104, "Connection reset by peer")
        except ConnectionResetError as error:
            raise RuntimeError("the client gave up") from error

    assert run_main(command) == 1
    assert capfd.readouterr().err == (
        "error: ConnectionResetError: Connection reset by peer; a connection or the server at its other end "
        "failed: try the same command again\n"
    )


def test_a_tokenizer_of_the_hub_without_a_network_is_a_short_sentence_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        NAMES["a tokenizer of the Hub"]()
    assert str(error.value) == (
        "tokenizer 'nobody/has-this' is no file, folder or tiktoken encoding here, and the Hugging Face Hub is not asked "
        "(HF_HUB_OFFLINE); use 'bytes' (built in), a local .tiktoken rank file or the folder of a Hugging Face tokenizer"
    )
