"""What a figure lacks, and the command that makes it."""

from typing import NamedTuple

from undo.experiment import matches, script_of, setting_folder, written


class Missing(NamedTuple):
    """`runs`: a glob of run names."""

    what: str
    runs: str

    def explain(self, setting: str) -> str:
        folder = setting_folder(setting)
        if folder is not None and any(matches(name, self.runs) for name in written(folder)):
            script = script_of(setting)
            return f"{self.what} is missing; make it with: uv run {script} {setting} --only '{self.runs}'"
        return f"{self.what} is missing, and configs/{setting} holds no {self.runs}; see configs/language"
