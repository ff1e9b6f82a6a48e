"""Test writing: old content survives every failure, nothing goes through links, one process at a time per folder."""

import ast
import errno
import fcntl
import logging
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastssl
from fastssl import files, folder_lock
from fastssl.files import WriteError, append_text, replacing, write_json, write_text
from fastssl.models.folder import read_safetensors, write_weights

PACKAGE = Path(fastssl.__file__).parent

#: Functions and methods that change what is on a disk. `replace` and `rename` count with one argument, as of a path.
_WRITERS = {
    *("FileHandler", "NamedTemporaryFile", "SummaryWriter", "TemporaryDirectory", "TemporaryFile", "chmod"),
    *("ftruncate", "hardlink_to", "link", "makedirs", "memmap", "mkdir", "mkdtemp", "mkstemp", "removedirs", "rename"),
    *("replace", "rmdir", "rmtree", "save", "save_file", "savefig", "savetxt", "savez", "serialize_file", "symlink"),
    *("symlink_to", "to_file", "to_jsonl", "tofile", "touch", "truncate", "unlink", "write_bytes", "write_text"),
}
_WHOLE_NAMES = {"json.dump", "os.remove", "pickle.dump", "shutil.copy", "shutil.copyfile", "shutil.copytree"}
_WHOLE_NAMES |= {"shutil.move", "soundfile.write", "yaml.dump"}
_ELSEWHERE = "in a temporary path that `replacing` gave"
_TEMPORARY = "in the system's temporary folder"
#: (file, call) -> number of calls, and why it may write without `fastssl.files`.
PLACES = {
    ("data/synthetic.py", "open"): (1, _ELSEWHERE),
    ("data/synthetic.py", "partial.mkdir"): (1, _ELSEWHERE),
    ("data/synthetic.py", "shutil.copy"): (1, _TEMPORARY),
    ("data/synthetic.py", "soundfile.write"): (1, _ELSEWHERE),
    ("data/synthetic.py", "tempfile.TemporaryDirectory"): (1, _TEMPORARY),
    ("data/audio.py", "os.open"): (1, "to read"),
    ("names.py", "os.open"): (1, "to read"),
    ("data/corpus.py", "open"): (1, _ELSEWHERE),
    ("eval/label/command.py", "open"): (1, _ELSEWHERE),
    ("eval/probe/features.py", "np.memmap"): (1, _TEMPORARY),
    ("eval/probe/features.py", "tempfile.TemporaryFile"): (1, _TEMPORARY),
    ("eval/quality/measure.py", "np.memmap"): (1, _TEMPORARY),
    ("eval/quality/measure.py", "open"): (1, _TEMPORARY),
    ("eval/quality/measure.py", "path.touch"): (1, _TEMPORARY),
    ("eval/quality/measure.py", "tempfile.TemporaryDirectory"): (1, _TEMPORARY),
    ("eval/showing.py", "figure.savefig"): (1, _ELSEWHERE),
    ("folder_lock.py", "(folder / LOCK_FILE).unlink"): (1, "the lock itself"),
    ("folder_lock.py", "folder.rmdir"): (1, "a folder that stayed empty"),
    ("folder_lock.py", "os.ftruncate"): (1, "the lock itself, opened without following links"),
    ("folder_lock.py", "os.open"): (1, "the lock itself, opened without following links"),
    ("models/folder.py", "open"): (1, _ELSEWHERE),
    ("models/publish.py", "(Path(folder) / _CARD).write_text"): (1, _TEMPORARY),
    ("models/publish.py", "tempfile.TemporaryDirectory"): (1, _TEMPORARY),
    ("models/folder.py", "save_file"): (1, _ELSEWHERE),
    ("train/checkpoint_file.py", "open"): (1, _ELSEWHERE),
    ("train/checkpoint_file.py", "torch.save"): (1, _ELSEWHERE),
}


def _writes(path: Path) -> Counter[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "fastssl.files"]
    ours = {alias.name for node in imports for alias in node.names}
    found: Counter[str] = Counter()
    for node in nodes:
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        if last in ("replace", "rename"):
            wrong: object = isinstance(node.func, ast.Attribute) and len(node.args) == 1 and not node.keywords
        elif last == "open":
            modes = [set(_text(one)) for one in (*node.args, *(word.value for word in node.keywords))]
            wrong = name == "os.open" or any(mode & set("wax+") and mode <= set("rwaxbt+") for mode in modes)
            name = "os.open" if name == "os.open" else "open"
        else:
            wrong = name in _WHOLE_NAMES or (last in _WRITERS and name not in ours)
        found[name] += bool(wrong)
    return +found


def _text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_nothing_else_writes() -> None:
    found = {
        (path.relative_to(PACKAGE).as_posix(), call): number
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "files.py"
        for call, number in _writes(path).items()
    }
    assert found == {place: number for place, (number, _) in PLACES.items()}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_files_have_the_permissions_that_the_umask_asks_for(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "x")
        write_weights(tmp_path / "weights", {"x": torch.ones(2)})
        append_text(tmp_path / "lines", "x")
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO])
def test_errors_of_the_system_name_the_file_and_keep_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    path = tmp_path / "file"
    path.write_text("old")
    for name, write in {"_sync": write_text, "_commit": write_text, "_write": append_text}.items():
        with monkeypatch.context() as patched:
            patched.setattr(files, name, fail)
            with pytest.raises(WriteError, match=f"{path} cannot be written: {os.strerror(code)}; ") as caught:
                write(path, "new")
        assert caught.value.errno == code
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_a_line_that_does_not_fit_is_not_appended_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(number: int, content: bytes) -> None:
        os.write(number, content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    append_text(tmp_path / "lines", "one\n")
    monkeypatch.setattr(files, "_write", fill_up)
    with pytest.raises(WriteError, match="make room there"):
        append_text(tmp_path / "lines", "two\n")
    assert (tmp_path / "lines").read_text() == "one\n"


def test_errors_of_reading_keep_their_class(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        (tmp_path.parent / "elsewhere").read_text()


def test_nothing_is_written_through_links(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_text("theirs")
    link = tmp_path / "link"
    link.symlink_to(foreign)
    with pytest.raises(WriteError, match=r"link cannot be written: .*; .* so delete the link"):
        append_text(link, "ours")
    write_json(link, {"ours": 1})
    assert not link.is_symlink()
    assert foreign.read_text() == "theirs"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WriteError, match="pipe cannot be written"):
        append_text(tmp_path / "pipe", "ours")
    (tmp_path / "logs").symlink_to(tmp_path)
    with pytest.raises(WriteError, match=r"logs cannot be written: it is a symbolic link"):
        files.check_no_links(tmp_path, ["logs"])


def test_a_folder_takes_the_place_of_another_file_by_file(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with replacing(tmp_path / "folder") as partial:
            partial.mkdir()
            write_text(partial / "file", content)
            if content == "old":
                write_text(partial / "other", content)
    assert {path.name: path.read_text() for path in (tmp_path / "folder").iterdir()} == {"file": "new", "other": "old"}
    message = rf"{tmp_path}/folder/none/file cannot be written"
    with pytest.raises(WriteError, match=message), replacing(tmp_path / "folder") as partial:
        write_text(partial / "none" / "file", "newer")
    assert (tmp_path / "folder" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_process_left_is_removed_later(tmp_path: Path) -> None:
    for name, age_s in {"old": 100, "new": 10}.items():
        room = tmp_path / "inside" / f".partial-{name}"
        room.mkdir(parents=True)
        (room / "file").touch()
        os.utime(room, (time.time() - age_s,) * 2)
    with folder_lock.folder_lock(tmp_path, option="--output"):
        pass
    assert [path.name for path in (tmp_path / "inside").iterdir()] == [".partial-new"]


def test_damaged_weights_are_found(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16), "scalar": torch.tensor(1)}
    write_weights(path, weights)
    content = path.read_bytes()
    for _ in range(3):  # in the same order every time
        write_weights(path, weights)
        assert path.read_bytes() == content
    found = read_safetensors(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="checksum differs"):
        read_safetensors(path)


def _in_child(work: Callable[[], None]) -> int:
    """Start a process that does some work and then waits to be killed; return its number once the work is done."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            work()
            os.write(writer, b"x")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return process


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    held = folder_lock.folder_lock(folder, option="--output")
    process = _in_child(held.__enter__)
    try:
        message = rf"--output: {folder} is in use by process {process} on host \S+; wait for it, or choose another"
        with pytest.raises(ValueError, match=message), folder_lock.folder_lock(folder, option="--output"):
            pass
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
    with folder_lock.folder_lock(folder, option="--output"):  # the lock ended with its process
        with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} "):
            folder_lock.folder_lock(folder, option="--output").__enter__()
        assert not any(map(files.is_partial, folder.iterdir()))
    assert list(folder.iterdir()) == []


def test_a_process_that_loads_data_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = folder_lock.folder_lock(tmp_path, option="--output")
    lock.__enter__()
    process = _in_child(lambda: None)
    try:
        (number,) = folder_lock._held
        os.close(number)  # as if this process had been killed
        folder_lock._held.clear()
        with folder_lock.folder_lock(tmp_path, option="--output"):
            assert len(folder_lock._held) == 1
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)


def test_waiting_for_the_other_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastssl")
    process = _in_child(folder_lock.folder_lock(tmp_path, option="--cache").__enter__)
    killer = threading.Timer(0.1, os.kill, (process, 9))
    killer.start()
    with folder_lock.folder_lock(tmp_path, option="--cache", wait=True):
        assert f"in use by process {process} on host" in caplog.text
    killer.join()
    os.waitpid(process, 0)


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with folder_lock.folder_lock(tmp_path / "run", option="--output"):
        assert (tmp_path / "run").is_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks_get_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    with folder_lock.folder_lock(tmp_path, option="--output"):
        pass
    assert len(caplog.records) == 1
    assert "is on a file system without locks" in caplog.text


def test_what_a_link_leads_to_is_not_tidied_up(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, run / "checkpoints", other):
        (folder / ".partial-1").mkdir(parents=True)
        os.utime(folder / ".partial-1", (0, 0))
    (run / "link").symlink_to(other)
    files.remove_stale(run)
    assert [path.parent.name for path in tmp_path.rglob(".partial-1")] == ["other"]


def test_a_lock_is_got_after_its_holder_removed_the_folder(tmp_path: Path) -> None:
    """The first of two runs with a new cache has made the folder, and fails before it writes anything."""
    folder, got = tmp_path / "cache", threading.Event()

    def second() -> None:
        with folder_lock.folder_lock(folder, option="--output", wait=True):
            got.set()

    waiting = threading.Thread(target=second)
    with folder_lock.folder_lock(folder, option="--output"):
        waiting.start()
        time.sleep(0.2)
        assert not got.is_set()
    waiting.join(10)
    assert got.is_set()
