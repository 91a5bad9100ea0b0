"""All benchmarks in turn, and their table: benchmarks/results/<date>-<device>.jsonl and .md.

    uv run benchmarks/report.py [--quick]          # 25 minutes on 2 cores
    uv run benchmarks/report.py --table FILE.jsonl  # only the table of an earlier run

Equality is checked before anything is timed (equality.py), and each benchmark compares the values of all its sides.
On a machine with a GPU the paper's lengths and batches are used; `bash benchmarks/gpu.sh report` calls it on one.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure

HERE = Path(__file__).parent
ON_CPU = [
    "losses.py --tokens 512 --threads 1 --repeats 2",
    "losses.py --tokens 1024 --case kl --sides published,ours --repeats 1",
    "train.py --length 256 --case distill-0.1B --repeats 2",
    "train.py --length 128 --case rmu-0.1B",
    "evaluate.py --case accuracy --repeats 1",
    "evaluate.py --case validation_loss --length 2048 --documents 16 --repeats 1",
    "relearn.py --case demo --repeats 1",
    "relearn.py --case language-0.1B --steps 2 --repeats 1",
]
SMALL = [  # seconds each, to try the way to the table
    "losses.py --tokens 32 --vocabulary 500 --hidden 16 --threads 1 --case kl --sides published,ours --repeats 1",
    "train.py --small --vocabulary 500 --length 32 --threads 1 --case pretrain-0.1B --sides published,ours --repeats 1",
]
ON_A_GPU = [
    "losses.py --tokens 8192",
    *(
        f"train.py --compile --case {kind}-{size}"
        for kind in ("pretrain", "distill")
        for size in (
            "0.1B --length 2048 --rows 32 --micro-rows 4 --our-micro-rows 16",
            "0.3B --length 256 --rows 360 --micro-rows 60 --our-micro-rows 120",
        )
    ),
    "train.py --length 2048 --rows 4 --case rmu-0.1B",
    "train.py --length 1024 --rows 8 --micro-rows 1 --our-micro-rows 4 --case attack-2B --sides published,ours",
    "evaluate.py --length 2048 --documents 1024",
    "relearn.py --case demo",
    "relearn.py --case language-0.1B --case language-0.1B-subset --length 2048 --rows 8 --steps 20 --documents 200",
]
TARGETS = {  # of issue 3, first column: CPU with 2 cores
    "losses/kl": ">= 1.7",
    "losses/ce": ">= 1.6",
    "losses/maxent": ">= 2.5",
    "train/distill-0.1B": ">= 2",
    "train/rmu-0.1B": ">= 5",
    "evaluate/accuracy": ">= 3.9",
    "evaluate/validation_loss": ">= 3",
    "relearn/demo": ">= 5",
    "relearn/language-0.1B": ">= 5",
}


GOALS = {  # of issue 15, on one H200: tokens a second, or the ratio to the published side
    "train/pretrain-0.1B": "320,000 tokens/s",
    "train/distill-0.1B": "220,000 tokens/s, >= 6",
    "relearn/language-0.1B": ">= 20",
    "relearn/language-0.1B-subset": ">= 20",
}
LIMIT = 790e12  # FLOP/s: what an H200 reaches in large bf16 products; its table says 989


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repetition of each")
    parser.add_argument("--small", action="store_true", help="two tiny ones, to try the way to the table")
    parser.add_argument("--unchecked", action="store_true", help="without equality.py, which gpu.sh's check has run")
    parser.add_argument("--into", type=Path, default=HERE / "results", help="the folder of the results")
    parser.add_argument("--out", type=Path, help="the file of JSON lines, instead")
    parser.add_argument("--table", type=Path, help="only make the table of this file")
    args = parser.parse_args()
    if args.table:
        args.table.with_suffix(".md").write_text(table(args.table))
        return
    facts = measure.environment()
    name = f"{facts['date']}-{facts['device'].replace(' ', '_').lower()}"
    out = args.out or args.into / f"{name}.jsonl"
    out.parent.mkdir(exist_ok=True, parents=True)
    out.unlink(missing_ok=True)
    failed = []
    if not args.unchecked:
        subprocess.run([sys.executable, HERE / "equality.py", *(["--compile"] if measure.cuda() else [])], check=True)
    for command in SMALL if args.small else ON_A_GPU if measure.cuda() else ON_CPU:
        script, *rest = command.split()
        rest += ["--repeats", "1"] if args.quick else []
        print(f"{script} {' '.join(rest)}", flush=True)
        if subprocess.run([sys.executable, HERE / script, *rest, "--out", out]).returncode != 0:
            failed.append(command)
        if out.exists():
            out.with_suffix(".md").write_text(table(out))
    sys.exit(f"failed: {failed}" if failed else 0)


def table(path: Path) -> str:
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    facts = lines[0]
    titles = list(dict.fromkeys(title for line in lines for title in line["ratios"]))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    cpu = not any(card in facts["device"] for card in measure.PEAK_FLOPS)
    text = [
        f"# Benchmarks, {facts['date']}, {facts['device']}",
        "",
        f"{facts['cores']} cores; {versions}; revision {facts['revision']}. "
        f"Made by `uv run benchmarks/report.py`; all numbers in {path.name}.",
        "",
        "Ratios are baseline / ours, medians over interleaved rounds: larger is better. *Published*: the authors' way, "
        "fp32. *Fixed*: the same with one-line fixes (autocast, fused AdamW, batched generation). *Target*: of the "
        "first ratio, or of what it names. *Limit*: all FLOPs at 790 TFLOP/s, which an H200 reaches.",
        "",
        "| benchmark | tokens | threads | "
        + " | ".join(titles)
        + " | target | memory | tokens/s | GFLOP/s | MFU | of the limit |",
        "| --- |" + " --- |" * (len(titles) + 8),
    ]
    for line in lines:
        ratios = [line["ratios"].get(title) for title in titles]
        cells = [f"{r:.2f}" if r is not None else "-" for r in ratios]
        cells.append((TARGETS if cpu else GOALS).get(line["name"], "-"))
        cells.append("-" if line["memory_ratio"] is None else f"{line['memory_ratio']:.1f}")
        cells.append(f"{line['tokens_per_s']:,}")
        cells.append("-" if line["flops_per_s"] is None else f"{line['flops_per_s'] / 1e9:.0f}")
        cells.append("-" if line["mfu"] is None else f"{line['mfu']:.1%}")
        cells.append("-" if line["mfu"] is None else f"{(line['flops_per_s'] or 0) / LIMIT:.1%}")
        text.append(f"| {line['name']} | {line['tokens']:,} | {line['threads']} | " + " | ".join(cells) + " |")
    sides = list(dict.fromkeys(side for line in lines for side in line["seconds"]))
    text += ["", "Seconds, and peak MiB above what a side holds between repetitions:", ""]
    text += [
        "| benchmark | tokens | threads | " + " | ".join(sides) + " |",
        "| --- | --- | --- |" + " --- |" * len(sides),
    ]
    for line in lines:
        cells = [f"{line['seconds'][s]:.3g} s, {line['peak_mib'][s]:,}" if s in line["seconds"] else "-" for s in sides]
        text.append(f"| {line['name']} | {line['tokens']:,} | {line['threads']} | " + " | ".join(cells) + " |")
    return "\n".join([*text, ""])


if __name__ == "__main__":
    main()
