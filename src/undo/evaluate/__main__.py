"""python -m undo.evaluate export FOLDER path=... [shots=5 shots_path=... share=0.4 ...]

Writes the questions as a task folder of the lm-evaluation-harness and prints the command that measures it.
"""

import shlex
import sys
from pathlib import Path

from undo.config.guard import guarded
from undo.config.schema import validate
from undo.config.sweep import parse_overrides
from undo.evaluate.questions import Questions


def main(arguments: list[str]) -> int:
    return guarded(lambda: export(arguments))


def export(arguments: list[str]) -> int:
    match arguments:
        case ["export", folder, *values] if values:
            pass
        case _:
            print(__doc__)
            return 0 if arguments in (["-h"], ["--help"]) else 2
    questions = validate(Questions, parse_overrides(values), "export")
    questions.check()
    from undo.evaluate.tasks import write_task

    asked = write_task(questions, Path(folder))
    model = ["--model", "hf", "--model_args", "pretrained=MODEL_FOLDER,dtype=float32"]
    print(shlex.join(["lm_eval", *model, *asked]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
