"""Where the WMDP corpora come from. We cannot redistribute them, and two of the four teach harm."""

import re
from pathlib import Path
from typing import Final

HUB: Final = "https://huggingface.co/datasets/"
FORM: Final = "cais/wmdp-bio-forget-corpus"  # gated: its page has the form to ask for access
OTHERS: Final = "cais/wmdp-corpora"  # subsets bio-retain-corpus, cyber-forget-corpus, cyber-retain-corpus
ALL: Final = f"the WMDP corpora are on the hub: ask at {HUB}{FORM} (bio forget) or see {HUB}{OTHERS} (the others)"


def origin(path: str) -> str | None:
    """One line about a missing file: where to ask for the corpus and where to put it. None if it is not one of WMDP's.

    Files in a folder `qa` are made from a corpus; the line names the command that makes them.
    """
    if Path(path).parent.name == "qa":
        made = "uv run python -m undo.prepare_data.write_questions"
        return f"make it with: {made} --corpus <{Path(path).stem} corpus> --out {path} --endpoint <url> --model <name>"
    name = re.search(r"(bio|cyber)[\W_]*(forget|remove|retain)", path.lower())
    if name is None:
        return None
    domain, role = name[1], "retain" if name[2] == "retain" else "forget"
    if (domain, role) == ("bio", "forget"):
        return f"WMDP's bio forget corpus is gated: ask for it with the form at {HUB}{FORM}, then put its file there"
    subset = f"{domain}-{role}-corpus"
    return f"WMDP's {domain} {role} corpus is the subset {subset} of {HUB}{OTHERS}: get it there, put its file here"
