"""Finished runs with performances of one's choice, for what is drawn, claimed and reported of results."""

import json

from omegaconf import OmegaConf

from undo.results.results import Results
from undo.results.shown import Shown
from undo.settings.publish import read

STEPS = (0, 20, 40, 500)


class World:
    """Finished runs, written as the stages write them, with performances of one's choice."""

    def __init__(self, folder, evaluation="accuracy", setting="made"):
        self.folder, self.evaluation, self.setting = folder, evaluation, setting

    def run(self, name, variant, retain=0.9, forget=0.0, steps=100, seed=0, curve=None, also=None, **config):
        """`also`: further facts of run.json."""
        folder = self.folder / self.setting / name
        folder.mkdir(parents=True)
        base = {"seed": seed, "variant": variant, "evaluation": {"name": self.evaluation}, "retain_threshold": 0.05}
        base["training"] = {"learning_rate": 1e-3}
        if name.startswith("pretrain/"):
            base["mixture"] = {"retain": 1.0} if "oracle" in variant else {"retain": 0.5, "forget": 0.5}
        (folder / "config.yaml").write_text(OmegaConf.to_yaml({**base, **config}))
        facts = {"evaluation": {"retain": retain, "forget": forget}, "steps": steps, "flops": 1.0, "parents": {}}
        facts |= {"finished": "2026-11-21T10:00:00+00:00", "seconds": 60.0, "device": "a card", "threads": 1}
        facts |= {"versions": {"torch": "2.15.0"}, "git_revision": "0123456789abcdef+", "tokens": 10 * steps}
        facts |= {"peak_rss_bytes": 2**30, "peak_device_bytes": None, **(also or {})}
        (folder / "run.json").write_text(json.dumps(facts))
        curve = curve or {0: forget}
        lines = [json.dumps({"step": s, "retain": retain, "forget": f}) + "\n" for s, f in curve.items()]
        (folder / "metrics.jsonl").write_text("".join(lines))
        return name

    def model(self, name, variant, end, seed=0, **more):
        """A model, and an attack on it that ends at `end`, in equal steps from 0."""
        self.run(name, variant, seed=seed, **more)
        curve = {step: end * i / (len(STEPS) - 1) for i, step in enumerate(STEPS)}
        self.run(
            f"relearn/{variant}-{seed}", variant, seed=seed, curve=curve, model=name, training={"learning_rate": 1e-3}
        )

    def results(self, **shown) -> Results:
        """`shown`: what figures.yaml would say, instead of the one of the setting whose name this is."""
        return read(self.folder, self.setting, Shown.model_validate(shown, strict=False) if shown else None)
