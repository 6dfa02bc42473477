"""
Time the streamed merge, and compare it with copying the same bytes and with PEFT's merge in memory.

    export OMP_NUM_THREADS=1
    taskset -c 0 python benchmarks/merge.py --folder SCRATCH                    # 1.6 B parameters in bf16, 3.2 GB
    taskset -c 0 python benchmarks/merge.py --folder SCRATCH --dtype float32    # the same in fp32, 6.4 GB
    taskset -c 0 python benchmarks/merge.py --folder SCRATCH --num_layers 6     # tensors of the same shapes, fewer

Makes a random Llama checkpoint and a LoRA adapter on all its linear layers, once. Each way then runs in processes of
its own, in turns: `merge` is this package, `copy` is `shutil.copyfile` of every file, `peft` loads, merges and saves with
transformers and PEFT, `import` only imports the modules. All but the last end with every file synced to the disk. The
base's files are read once before each, so that they are in the page cache. Prints seconds (without the imports), the
peak of the resident memory above that of `import`, and ratios of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path


ALPHA = 1.5
RANK = 16
WAYS = ("import", "merge", "copy", "peft")
PEAK = "VmHWM:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Where checkpoint and results go.")
    parser.add_argument("--num_layers", type=int, default=24, help="Layers of 61 M parameters each.")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="Dtype of the base.")
    parser.add_argument("--rounds", type=int, default=3, help="Runs of each way.")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="What to run.")
    parser.add_argument("--run", choices=["create", *WAYS], help="Run one way in this process (internal).")
    args = parser.parse_args()
    folder = args.folder / f"{args.dtype}-{args.num_layers}"
    if args.run:
        run(args.run, folder, args.num_layers, args.dtype)
        return
    command = [sys.executable, __file__, "--folder", str(args.folder), "--num_layers", str(args.num_layers)]
    command += ["--dtype", args.dtype, "--run"]
    if not (folder / "adapter" / "adapter_model.safetensors").exists():
        subprocess.run([*command, "create"], check=True)
    results: dict[str, list[dict]] = {way: [] for way in args.ways}
    for _ in range(args.rounds):
        for way in args.ways:
            warm(folder / "base")
            content = subprocess.run([*command, way], check=True, stdout=subprocess.PIPE).stdout
            results[way].append(json.loads(content.splitlines()[-1]))
            shutil.rmtree(folder / "out", ignore_errors=True)
    report(results, sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")))


def warm(base: Path) -> None:
    """Write what other runs have left to the disk, and read the base into the page cache."""
    os.sync()
    for path in base.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def report(results: dict[str, list[dict]], size: int) -> None:
    """Print a line for each way, and the ratios."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"weights of {size / 1e9:.2f} GB, load average {load}")
    median = {
        way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in results.items()
    }
    bare = median.get("import", {"peak": 0})["peak"]
    for way, runs in results.items():
        seconds = ", ".join(f"{run['seconds']:.1f}" for run in runs)
        peak = max(run["peak"] for run in runs) - bare
        print(f"{way:7} {seconds} s (CPU {median[way]['cpu']:.1f} s), peak {peak / 1e9:.3f} GB above the imports")
    for way in {"copy", "peft"} & results.keys() if "merge" in results else ():
        seconds = median["merge"]["seconds"] / median[way]["seconds"]
        peak = (median["merge"]["peak"] - bare) / max(1, median[way]["peak"] - bare)
        print(f"merge / {way}: {seconds:.2f} of the time" + (f", {peak:.3f} of the memory" if way == "peft" else ""))


def run(way: str, folder: Path, num_layers: int, dtype: str) -> None:
    """Do one thing in this process, and print what it took."""
    import peft
    import torch
    import transformers

    from hf_unlearn.extrapolation import extrapolate

    base, adapter, output = folder / "base", folder / "adapter", folder / "out"
    start = time.perf_counter(), time.process_time()
    if way == "create":
        create(base, adapter, num_layers, getattr(torch, dtype))
    elif way == "merge":
        extrapolate(base, adapter, ALPHA, output, progress=False)
    elif way == "copy":
        output.mkdir()
        for path in base.iterdir():
            shutil.copyfile(path, output / path.name)
            sync(output / path.name)
    elif way == "peft":
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        model = peft.PeftModel.from_pretrained(model, adapter)
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("default", -ALPHA)
        model.merge_and_unload().save_pretrained(output, max_shard_size="1GB")
        for path in output.iterdir():
            sync(path)
    seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    status = Path("/proc/self/status").read_text().split()
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": int(status[status.index(PEAK) + 1]) * 1024}))


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def create(base: Path, adapter: Path, num_layers: int, dtype) -> None:
    """Write a random Llama checkpoint in files of 1 GB, and a LoRA adapter on all its linear layers."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_unlearn.extrapolation import write_shard
    from hf_unlearn.extrapolation.checkpoint import DTYPE_CODES, INDEX_FILE

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    state = model.state_dict()
    torch.manual_seed(0)
    base.mkdir(parents=True)
    config.save_pretrained(base)
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size="1GB"
    )
    for file, names in split.filename_to_tensors.items():
        entries = [(name, DTYPE_CODES[dtype], tuple(state[name].shape), state[name].nbytes) for name in names]
        write_shard(base / file, entries, lambda name: torch.empty(state[name].shape).normal_(std=0.02).to(dtype))
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (base / INDEX_FILE).write_text(json.dumps(index))

    targets = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM").save_pretrained(
        adapter
    )
    factors = {}
    for name in targets:
        rows, columns = state[f"model.{name}.weight"].shape
        prefix = f"base_model.model.model.{name}"
        factors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
        factors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    save_file(factors, adapter / "adapter_model.safetensors")


if __name__ == "__main__":
    main()
