"""All benchmarks in turn, and their table: benchmarks/results/<date>-<device>.jsonl and .md.

    uv run benchmarks/report.py [--quick]          # 25 minutes on 2 cores
    uv run benchmarks/report.py --table FILE.jsonl  # only the table of an earlier run

Equality is checked before anything is timed (equality.py), and each benchmark compares the values of all its sides.
On a machine with a GPU the paper's lengths and batches are used.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repetition of each")
    parser.add_argument("--table", type=Path, help="only make the table of this file")
    args = parser.parse_args()
    if args.table:
        args.table.with_suffix(".md").write_text(table(args.table))
        return
    facts = measure.environment()
    name = f"{facts['date']}-{facts['device'].replace(' ', '_').lower()}"
    out = HERE / "results" / f"{name}.jsonl"
    out.parent.mkdir(exist_ok=True)
    out.unlink(missing_ok=True)
    failed = []
    subprocess.run([sys.executable, HERE / "equality.py", *(["--compile"] if measure.cuda() else [])], check=True)
    for command in ON_A_GPU if measure.cuda() else ON_CPU:
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
        "fp32. *Fixed*: the same with one-line fixes (autocast, fused AdamW, batched generation).",
        "",
        "| benchmark | tokens | threads | "
        + " | ".join(titles)
        + " | target of the first | memory | tokens/s | GFLOP/s | MFU |",
        "| --- |" + " --- |" * (len(titles) + 7),
    ]
    for line in lines:
        ratios = [line["ratios"].get(title) for title in titles]
        cells = [f"{r:.2f}" if r is not None else "-" for r in ratios]
        cells.append(TARGETS.get(line["name"], "-") if cpu else "-")
        cells.append("-" if line["memory_ratio"] is None else f"{line['memory_ratio']:.1f}")
        cells.append(f"{line['tokens_per_s']:,}")
        cells.append("-" if line["flops_per_s"] is None else f"{line['flops_per_s'] / 1e9:.0f}")
        cells.append("-" if line["mfu"] is None else f"{line['mfu']:.1%}")
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
