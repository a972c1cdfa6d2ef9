"""DeepSpeed's first use compiles: a run says so, and finds the lock of a compile that was killed."""

import threading
import time

import pytest
from torch.utils.file_baton import FileBaton

from trainers.deepspeed_build import check_build_cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder of extensions, under an accelerate launch with DeepSpeed."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path / "deepspeed_shm_comm"


def test_the_first_compile_says_that_it_takes_time(cache, capsys, monkeypatch):
    """The message comes once, from the first process, and only if something has to be compiled."""
    check_build_cache(None)
    assert "DeepSpeed compiles an extension now: about two minutes" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    check_build_cache(None)
    monkeypatch.setenv("RANK", "0")
    cache.mkdir()
    (cache / "deepspeed_shm_comm.so").touch()
    check_build_cache(None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache / "another"))
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    check_build_cache(None)
    assert capsys.readouterr().err == ""
    check_build_cache({"zero_optimization": {"stage": 2}})
    assert "compiles" in capsys.readouterr().err


def test_a_killed_compiles_lock_is_named_and_a_living_ones_is_not(cache):
    cache.mkdir()
    with open(cache / "lock", "w"):
        check_build_cache(None)  # a compile keeps it open: the run waits for it
    with pytest.raises(ValueError) as error:
        check_build_cache(None)
    assert f"{cache / 'lock'} was left by a compile that was killed" in str(error.value)
    assert str(error.value).endswith(f"rm -r {cache}")


def test_a_lock_that_is_released_while_we_look_was_not_left(cache):
    """Each launch takes the lock, also when nothing is left to compile: another one must not take it for a killed compile's."""
    cache.mkdir()
    stop = threading.Event()

    def compiles():
        while not stop.is_set():
            baton = FileBaton(str(cache / "lock"))
            assert baton.try_acquire()
            time.sleep(0.002)
            baton.release()

    other = threading.Thread(target=compiles)
    other.start()
    try:
        for _ in range(30):
            check_build_cache(None)
    finally:
        stop.set()
        other.join()
