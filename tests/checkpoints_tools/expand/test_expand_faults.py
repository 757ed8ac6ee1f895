"""What can go wrong while a checkpoint is written: kills, full disks, bad values, sources that change."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_tools.reshard.reshard import reshard
from statex_dist.errors import CheckpointError
from tests.checkpoints_tools.builders import GLA, MAMBA2, load_all, random_tensors, run_expand, write_model
from tests.raising import raises
from tests.runs import REPOSITORY

OPTIONS = {"layers": "all", "factor": 2, "init": "inherit", "op": "grow_state", "max_shard_size": 20_000}

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.checkpoints_tools.builders import run_expand
from tests.checkpoints_tools.expand.test_expand_faults import OPTIONS

def progress(done, total):
    if done >= float(sys.argv[3]) * total:
        os.kill(os.getpid(), signal.SIGKILL)

run_expand(Path(sys.argv[1]), Path(sys.argv[2]), progress=progress, resume=True, workers=int(sys.argv[4]), **OPTIONS)
"""


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.name != "MANIFEST.json"}


def refused(directory: Path, target: Path, message: str, **options) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        run_expand(directory, target, **{"factor": 2, **options})
    assert "\n" not in str(caught.value)


class TestKilled:
    @pytest.fixture
    def source(self, tmp_path):
        write_model(tmp_path / "in", {**GLA, "num_hidden_layers": 6}, shards=2)
        return tmp_path / "in"

    def kill(self, source: Path, target: Path, share: float, workers: int = 1) -> Path:
        command = [sys.executable, "-c", KILLED, str(source), str(target), str(share), str(workers)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        assert not target.exists()
        return target.with_name(f".tmp-{target.name}")

    @pytest.mark.parametrize(("share", "workers"), [(0.0, 1), (0.3, 1), (0.6, 3), (0.95, 1), (1.0, 3)])
    def test_resume_gives_the_same_bytes_and_keeps_finished_shards(self, tmp_path, source, share, workers):
        run_expand(source, tmp_path / "whole", **OPTIONS)
        left = self.kill(source, tmp_path / "out", share, workers)
        journal = [json.loads(line) for line in (left / "JOURNAL.jsonl").read_text().splitlines()]
        finished = {line["file"]: (left / line["file"]).stat() for line in journal[1:]}
        assert share < 0.3 or workers > 1 or finished
        assert len(finished) < len(list((tmp_path / "whole").glob("*.safetensors")))
        run_expand(source, tmp_path / "out", resume=True, **OPTIONS)
        for name, stat in finished.items():
            now = (tmp_path / "out" / name).stat()
            assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), "a finished shard was redone"
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
        assert not left.exists()

    def test_killed_twice(self, tmp_path, source):
        run_expand(source, tmp_path / "whole", **OPTIONS)
        self.kill(source, tmp_path / "out", 0.3)
        self.kill(source, tmp_path / "out", 0.7)
        run_expand(source, tmp_path / "out", resume=True, **OPTIONS)
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")

    def test_a_torn_line_and_a_shard_cut_short_are_redone(self, tmp_path, source):
        run_expand(source, tmp_path / "whole", **OPTIONS)
        left = self.kill(source, tmp_path / "out", 0.7)
        journal = left / "JOURNAL.jsonl"
        journal.write_text(journal.read_text() + '{"file": "model-0')
        os.truncate(left / json.loads(journal.read_text().splitlines()[1])["file"], 100)
        run_expand(source, tmp_path / "out", resume=True, **OPTIONS)
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")

    def test_without_resume_everything_is_written_anew(self, tmp_path, source):
        left = self.kill(source, tmp_path / "out", 0.7)
        name = next(p.name for p in left.glob("*.safetensors"))
        (left / name).write_bytes(bytes((left / name).stat().st_size))
        (left / "stranger").mkdir()
        run_expand(source, tmp_path / "out", **OPTIONS)
        assert not (tmp_path / "out/stranger").exists()
        run_expand(source, tmp_path / "again", **OPTIONS)
        assert files_of(tmp_path / "out") == files_of(tmp_path / "again")

    @pytest.mark.parametrize("what", ["seed", "dtype", "source", "config", "tokenizer", "allow_nonfinite", "init"])
    def test_another_run_is_not_resumed(self, tmp_path, source, what):
        self.kill(source, tmp_path / "out", 0.5)
        others = {"seed": 1, "dtype": "bf16", "allow_nonfinite": True, "init": "lossless"}
        options = {what: others[what]} if what in others else {}
        if what == "source":
            (source / "model-00001-of-00002.safetensors").touch()
        elif what == "config":
            config = json.loads((source / "config.json").read_text())
            (source / "config.json").write_text(json.dumps({**config, "initializer_range": 0.5}))
        elif what == "tokenizer":
            (source / "tokenizer_config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="unfinished"):
            run_expand(source, tmp_path / "out", resume=True, **{**OPTIONS, **options})
        assert (tmp_path / ".tmp-out/JOURNAL.jsonl").exists(), "what is there is kept for whom it belongs to"

    def test_a_complete_target_is_left_alone(self, tmp_path, source):
        first = run_expand(source, tmp_path / "out", resume=True, **OPTIONS)
        before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
        again = run_expand(source, tmp_path / "out", resume=True, **OPTIONS)
        assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
        assert again.state_after == first.state_after
        refused(source, tmp_path / "out", "exists and is not empty; pass --overwrite", resume=True, seed=9)

    def test_a_complete_target_that_was_damaged_is_not_called_complete(self, tmp_path, source):
        run_expand(source, tmp_path / "out", resume=True, **OPTIONS)
        path = next((tmp_path / "out").glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=path.name):
            run_expand(source, tmp_path / "out", resume=True, **OPTIONS)

    def test_a_damaged_journal_starts_over(self, tmp_path, source):
        left = self.kill(source, tmp_path / "out", 0.7)
        (left / "JOURNAL.jsonl").write_bytes(bytes(100))
        run_expand(source, tmp_path / "out", resume=True, **OPTIONS)
        run_expand(source, tmp_path / "whole", **OPTIONS)
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")

    def test_workers_do_not_matter(self, tmp_path, source):
        for workers in (1, 2, 7):
            run_expand(source, tmp_path / f"out{workers}", workers=workers, **OPTIONS)
        assert files_of(tmp_path / "out1") == files_of(tmp_path / "out2") == files_of(tmp_path / "out7")

    def test_a_target_that_appears_meanwhile_is_not_replaced(self, tmp_path, source):
        def appear(done, total):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out/theirs").write_text("precious")

        with raises(CheckpointError, tmp_path / "out", "not empty"):
            run_expand(source, tmp_path / "out", progress=appear, **OPTIONS)
        assert files_of(tmp_path / "out") == {"theirs": b"precious"}

    def test_an_interrupted_run_with_resume_keeps_what_it_has(self, tmp_path, source):
        def stop(done, total):
            if done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_expand(source, tmp_path / "out", resume=True, progress=stop, workers=1, **OPTIONS)
        assert list((tmp_path / ".tmp-out").glob("*.safetensors"))
        run_expand(source, tmp_path / "out", resume=True, **OPTIONS)
        run_expand(source, tmp_path / "whole", **OPTIONS)
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")

    def test_two_processes_do_not_write_the_same_target(self, tmp_path, source):
        (tmp_path / ".tmp-out").mkdir()
        lock = os.open(tmp_path / ".tmp-out", os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(source, tmp_path / "out", "another process is writing")
        assert (tmp_path / ".tmp-out").exists()
        os.close(lock)
        run_expand(source, tmp_path / "out", **OPTIONS)


def mounted(path: Path, options: str) -> None:
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small file system needs root")


@pytest.fixture
def small_disk(tmp_path):
    mounted(tmp_path / "disk", "size=1m")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


@pytest.fixture
def big_source(tmp_path):
    values = {**GLA, "vocab_size": 4000}
    write_model(tmp_path / "in", values)
    return tmp_path / "in"


class TestDisk:
    def test_a_disk_too_small_is_refused_before_a_byte_is_written(self, small_disk, big_source):
        before = files_of(big_source)
        refused(big_source, small_disk / "out", r"No space left on device: \d+ bytes are needed, \d+ are free")
        assert list(small_disk.iterdir()) == []
        assert files_of(big_source) == before

    @pytest.mark.parametrize("resume", [False, True])
    def test_a_disk_that_fills_up_meanwhile(self, small_disk, tmp_path, resume):
        write_model(tmp_path / "in", {**GLA, "vocab_size": 2000})

        def fill(done, total):
            with (small_disk / "other").open("ab", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    return

        message = "cannot be written: No space left on device"
        options = {"progress": fill, "workers": 1, "max_shard_size": 100_000, "resume": resume}
        refused(tmp_path / "in", small_disk / "out", message, **options)
        # Finished parts are kept for --resume, and for it alone.
        left = [".tmp-out"] if resume else []
        assert sorted(p.name for p in small_disk.iterdir()) == [*left, "other"]
        if resume:
            (small_disk / "other").unlink()
            run_expand(tmp_path / "in", tmp_path / "whole", factor=2, max_shard_size=100_000)
            run_expand(tmp_path / "in", small_disk / "out", factor=2, max_shard_size=100_000, resume=True)
            assert sorted(p.name for p in small_disk.iterdir()) == ["out"]
            assert files_of(small_disk / "out") == files_of(tmp_path / "whole")

    def test_a_read_only_disk(self, tmp_path, big_source):
        mounted(tmp_path / "ro", "ro")
        try:
            refused(big_source, tmp_path / "ro/out", "cannot be written: Read-only file system")
        finally:
            subprocess.run(["umount", str(tmp_path / "ro")], check=True)

    @pytest.mark.skipif(os.geteuid() != 0, reason="changes the effective user")
    def test_no_permission(self):
        with tempfile.TemporaryDirectory() as name:  # pytest's own directories are closed to other users
            root = Path(name)
            root.chmod(0o755)
            write_model(root / "in", GLA)
            (root / "in/model.safetensors").chmod(0o644)
            (root / "locked").mkdir(mode=0o755)
            os.seteuid(65534)
            try:
                refused(root / "in", root / "locked/out", "cannot be written: Permission denied")
            finally:
                os.seteuid(0)
            assert list((root / "locked").iterdir()) == []


class TestValues:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite(self, tmp_path, dtype, value):
        tensors = random_tensors(GLA, dtype)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        write_model(tmp_path / "in", GLA, tensors)
        refused(tmp_path / "in", tmp_path / "out", "'model.layers.1.mlp.up_proj.weight' holds NaN or Inf in the source")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
        run_expand(tmp_path / "in", tmp_path / "out", factor=2, allow_nonfinite=True)
        written = load_all(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(written.isfinite(), tensors["model.layers.1.mlp.up_proj.weight"].isfinite())

    def test_not_finite_in_a_kept_row_of_a_grown_tensor(self, tmp_path):
        tensors = random_tensors(MAMBA2)
        tensors["backbone.layers.0.mixer.in_proj.weight"][-1, 0] = torch.nan
        write_model(tmp_path / "in", MAMBA2, tensors)
        refused(tmp_path / "in", tmp_path / "out", "'backbone.layers.0.mixer.in_proj.weight' holds NaN or Inf")

    def test_a_value_too_large_for_the_new_dtype(self, tmp_path):
        tensors = random_tensors(GLA)
        tensors["lm_head.weight"][0, 0] = 1e5
        write_model(tmp_path / "in", GLA, tensors)
        message = "'lm_head.weight' holds NaN or Inf once it is stored as F16"
        refused(tmp_path / "in", tmp_path / "out", message, dtype="fp16")
        run_expand(tmp_path / "in", tmp_path / "out", factor=2, dtype="bf16")

    def test_float8_is_copied_but_not_grown_nor_converted(self, tmp_path):
        tensors = random_tensors(GLA)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
        write_model(tmp_path / "in", GLA, tensors)
        run_expand(tmp_path / "in", tmp_path / "out", factor=2)
        written = load_all(tmp_path / "out")["lm_head.weight"]
        assert torch.equal(written.view(torch.uint8), tensors["lm_head.weight"].view(torch.uint8))
        message = "'lm_head.weight': values of dtype F8_E4M3 are not converted"
        refused(tmp_path / "in", tmp_path / "bf16", message, dtype="bf16")
        name = "model.layers.0.attn.g_norm_swish_gate.weight"
        save_file({**tensors, name: tensors[name].to(torch.float8_e5m2)}, tmp_path / "in/model.safetensors")
        message = f"'{name}' is to get new rows but has dtype F8_E5M2 .* convert the checkpoint to one of"
        refused(tmp_path / "in", tmp_path / "grown", message)

    def test_float8_nan(self, tmp_path):
        tensors = random_tensors(GLA)
        for dtype, bits in ((torch.float8_e4m3fn, 0x7F), (torch.float8_e5m2, 0x7C)):
            strange = torch.zeros(37, 32, dtype=torch.uint8)
            strange[1, 2] = bits
            tensors["lm_head.weight"] = strange.view(dtype)
            write_model(tmp_path / "in", GLA, tensors)
            refused(tmp_path / "in", tmp_path / "out", "'lm_head.weight' holds NaN or Inf")


class TestSource:
    @pytest.mark.parametrize("change", ["touch", "grow", "replace"])
    def test_a_source_that_changes_meanwhile(self, tmp_path, change):
        write_model(tmp_path / "in", GLA)
        path = tmp_path / "in/model.safetensors"

        def meddle(done, total):
            if change == "touch":
                os.utime(path)
            elif change == "grow":
                with path.open("ab") as file:
                    file.write(b"x")
            else:
                shutil.copy(path, tmp_path / "copy")
                (tmp_path / "copy").replace(path)

        message = r"model\.safetensors changed while it was being read; run again when nothing writes to it"
        refused(tmp_path / "in", tmp_path / "out", message, progress=meddle, workers=1)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".tmp*"))

    def test_missing_and_unknown_tensors_are_listed(self, tmp_path):
        tensors = random_tensors(GLA)
        gone = [n for n in tensors if "mlp" in n]
        write_model(tmp_path / "in", GLA, {n: t for n, t in tensors.items() if n not in gone})
        # Where the directory's name is long, the middle of the line is left out.
        names = ", ".join(f"'{n}'" for n in gone[:3])
        refused(tmp_path / "in", tmp_path / "out", f"lacks tensors {names}.* and {len(gone) - 4} more of the gla model")
        extra = {f"x{i}": torch.zeros(1) for i in range(3)}
        write_model(tmp_path / "more", GLA, {**tensors, **extra})
        refused(tmp_path / "more", tmp_path / "out", "'x0', 'x1', 'x2'.* gla ")

    def test_an_unknown_tensor_of_an_expanded_module_is_not_passed_through(self, tmp_path):
        name = "backbone.layers.0.mixer.rotary"
        write_model(tmp_path / "in", MAMBA2, {**random_tensors(MAMBA2), name: torch.zeros(4)})
        refused(tmp_path / "in", tmp_path / "out", f"'{name}'")


def test_files_that_are_links_to_elsewhere_are_not_carried_along(tmp_path):
    write_model(tmp_path / "gla", GLA)
    (tmp_path / "gla" / "merges.txt").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match=r"merges\.txt .* /etc/passwd"):
        run_expand(tmp_path / "gla", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"merges\.txt .* /etc/passwd"):
        reshard(tmp_path / "gla", tmp_path / "out", to="hf")
    # The model card quotes the source's.
    (tmp_path / "gla" / "merges.txt").rename(tmp_path / "gla" / "README.md")
    with pytest.raises(CheckpointError, match=r"README\.md .* /etc/passwd"):
        reshard(tmp_path / "gla", tmp_path / "out", to="hf")


def test_a_snapshot_of_the_hub_cache_is_a_source(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    write_model(blobs, GLA)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    run_expand(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"max_new_tokens": 3}'
