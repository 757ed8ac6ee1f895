"""The start of ZeRO-3 on 1, 2 and 4 real ranks beside DeepSpeed's own, and the reading of a save and a resume.

DeepSpeed's own start is that of a whole model on every rank, which ``deepspeed.initialize`` partitions. Both train the
same model of random bf16 weights, read from a safetensors file. Run as
``python -m benchmarks.scale_start [--hidden 1024] [--layers 8]``; ``benchmarks.scale`` has its figures too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.growth import Row
from benchmarks.measure import figure, markdown
from statex_dist.config import parse_config
from statex_dist.models.hf import save_pretrained
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict
from statex_dist.run_config import RunConfig

MIB = 2**20
RANKS = (1, 2, 4)
WAYS = ("sharded", "whole")
HIDDEN, LAYERS = 1024, 8


def memory_of_process() -> dict[str, float]:
    """Return this process's anonymous and proportional memory, in MiB (proc(5))."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    values = {line.split(":")[0]: float(line.split()[1]) / 1024 for line in [*status, *rollup] if line.endswith(" kB")}
    return {"anonymous": values["RssAnon"], "proportional": values["Pss"]}


def bytes_read() -> float:
    """Return the MiB that this process has read through system calls (proc(5), ``rchar``)."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"]) / MIB


def start(rank: int, world_size: int, directory: str, way: str, port: int, results: Any) -> None:
    """Start one rank and report what it took."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    import deepspeed
    import torch
    import torch.distributed as dist

    import statex_dist.engine.zero.sharded_start  # noqa: F401 - now, so that what it imports does not count
    from statex_dist.distributed.env import read_env
    from statex_dist.run_parts import build_engine, build_model, open_values

    torch.set_num_threads(1)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports torch._dynamo, which must not count either
    config = parse_config(
        RunConfig,
        [
            *("--run_dir", f"{directory}/run", "--model.path", f"{directory}/model", "--data.path", directory),
            *("--data.packs_per_step", str(world_size), "--data.seq_len", "128", "--train.num_steps", "1"),
        ],
        prog="scale_start",
    )
    env, broadcasts, before = read_env(), 0, {}
    config.engine.join(env, config.shared_settings())
    send, initialize = dist.broadcast, deepspeed.initialize

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal broadcasts
        broadcasts += 1
        return send(*arguments, **options)

    def observed(*arguments: Any, **options: Any) -> Any:
        dist.barrier()
        before.update(memory_of_process())
        dist.barrier()
        return initialize(*arguments, **options)

    dist.broadcast, deepspeed.initialize = counted, observed
    base, read, began = memory_of_process(), bytes_read(), time.perf_counter()
    values = open_values(config) if way == "sharded" else None
    engine = build_engine(config, build_model(config, values), env, values)
    found = {
        "MiB of anonymous memory before deepspeed.initialize": before["anonymous"] - base["anonymous"],
        "MiB of memory of all ranks before it": before["proportional"] - base["proportional"],
        "MiB read": bytes_read() - read,
        "broadcasts": broadcasts,
        "seconds": time.perf_counter() - began,
    }
    results.put(found if way == "whole" else found | save_and_resume(engine, Path(directory, f"run{world_size}")))
    engine.close()


def save_and_resume(engine: Any, directory: Path) -> dict[str, float]:
    """Save a checkpoint and resume from it; return the MiB of this rank's files, and of its reading."""
    from statex_dist.engine.checkpoint_retention import SavePolicy
    from statex_dist.engine.checkpoints import Checkpoints
    from statex_dist.engine.documents import Documents

    directory.mkdir(exist_ok=True)
    checkpoints = Checkpoints(engine, directory, Documents(model={"config.json": "{}"}, settings={}), SavePolicy())
    begin = bytes_read()
    checkpoints.save(1, {}, last=True)
    saved = bytes_read()
    checkpoints.resume()
    files = [path.stat().st_size for path in (directory / "global_step1").glob(f"*_{engine.rank}_mp_*")]
    return {
        "MiB of a rank's files": sum(files) / MIB,
        "MiB read by a save": saved - begin,
        "MiB read by a resume": bytes_read() - saved,
    }


def measure(hidden: int = HIDDEN, layers: int = LAYERS, ranks: tuple[int, ...] = RANKS) -> list[Row]:
    """Start jobs of 1, 2 and 4 ranks in both ways; return the largest value of a rank, or the sum where all count."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        model = RecurrentLM(config_from_dict(model_settings(hidden, layers)))
        model.init_parameters(0)
        size = sum(parameter.numel() for parameter in model.parameters())
        save_pretrained(model.bfloat16(), Path(directory) / "model")  # type: ignore[arg-type]
        del model
        rows.append(("MiB of the model", 1, 2 * size / MIB, "MiB"))
        context = multiprocessing.get_context("spawn")
        for way in WAYS:
            for count in ranks:
                results = context.Queue()
                port = 29600 + os.getpid() % 300 + count
                jobs = [
                    context.Process(target=start, args=(rank, count, directory, way, port, results))
                    for rank in range(count)
                ]
                for job in jobs:
                    job.start()
                found = [results.get(timeout=600) for _ in jobs]
                for job in jobs:
                    job.join()
                for name in found[0]:
                    combine = sum if "all ranks" in name else max
                    rows.append((f"{name}, {way}", count, combine(result[name] for result in found), ""))
    return rows


def model_settings(hidden: int, layers: int) -> dict[str, Any]:
    """Return the configuration of a GLA model."""
    return {
        "model_type": "gla",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_heads": 4,
        "intermediate_size": 4 * hidden,
    }


def main() -> None:
    """Print the figures of both ways and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--layers", type=int, default=LAYERS)
    options = parser.parse_args()
    rows = measure(options.hidden, options.layers)
    print(f"model: {rows[0][2]:.0f} MiB")
    found = {(name, ranks): value for name, ranks, value, _ in rows[1:]}
    names = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name, *_ in rows[1:]))
    lines = []
    for name in names:
        for ranks in RANKS:
            ours, theirs = (found.get((f"{name}, {way}", ranks)) for way in WAYS)
            ratio = f"{ours / theirs:.2f}x" if ours is not None and theirs else ""
            lines.append([name, str(ranks), figure(ours, digits=4), figure(theirs, digits=4), ratio])
    print(markdown(["measured", "ranks", *WAYS, "ratio"], lines))


if __name__ == "__main__":
    main()
