"""The command `undo`, and what the scripts of a checkout call: one stage, or a whole setting."""

import sys
from importlib import import_module
from typing import Final, NoReturn

from undo.config.guard import guarded
from undo.experiments import cli
from undo.settings.stages import STAGES

WHOLE: Final = {  # name -> the module that has its `main`, and what it does
    "all": ("undo.settings.whole", "all stages of a setting, to its table, figures and report"),
    "wmdp": ("undo.settings.wmdp", "the same for a pretrained model, with a search of points in between"),
    "figures": ("undo.settings.publish", "the table, figures and report of finished runs"),
}

BESIDE: Final = {  # modules with a command line of their own
    "undo.prepare_data.write_questions": "questions with answers from a corpus, by a model or by rule",
    "undo.evaluate": "questions as a task of the lm-evaluation-harness",
}


def call(name: str) -> NoReturn:
    """Do what the script run_<name>.py does, with the arguments in sys.argv, and exit with its status."""
    if name in STAGES:
        sys.exit(guarded(lambda: cli.main(STAGES[name], STAGES)))
    sys.exit(guarded(import_module(WHOLE[name][0]).main))


def main() -> NoReturn:
    """`undo NAME ARGUMENTS`: the installed form of `run_NAME.py ARGUMENTS`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in STAGES or name in WHOLE:
        sys.argv[:2] = [f"undo {name}"]  # the name that --help and error messages give the program
        call(name)
    wrong = name not in ("-h", "--help")
    if wrong:
        print(f"error: there is no {name!r} to do", file=sys.stderr)
    print(usage(), file=sys.stderr if wrong else sys.stdout)
    sys.exit(2 if wrong else 0)


def usage() -> str:
    stages = (f"  {stage.name:9} {stage.caption}" for stage in STAGES.values())
    whole = (f"  {name:9} {what}" for name, (_, what) in WHOLE.items())
    return "\n".join(
        (
            "usage: undo NAME SETTING [key=value ...]     more with: undo NAME --help",
            "\na whole setting:",
            *whole,
            "\none stage of it, in the order of the pipeline:",
            *stages,
            "\nbeside them:",
            *(f"  python -m {module:34} {what}" for module, what in BESIDE.items()),
            "\nexample: undo all demo",
        )
    )
