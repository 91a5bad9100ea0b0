"""Numbers that the paper prints as results, to stand beside ours. Its settings are in configs/, held by tests."""

from typing import Final, NamedTuple

# What a setting's figures.yaml may name as `paper`. Those of a pretrained model (Section 6, Appendix D.2):
PRETRAINED: Final = ("wmdp", "wmdp_bio", "wmdp_cyber")
EXPERIMENTS: Final = ("language", "arithmetic", *PRETRAINED)


class Sweep(NamedTuple):
    """Appendix B.1: one unlearning run's performance, before and after."""

    initial_retain: float
    final_retain: float
    initial_forget: float
    final_forget: float


def _sweep(initial: tuple[float, float], finals: dict[float, tuple[float, float]]) -> dict[float, Sweep]:
    return {rate: Sweep(initial[0], retain, initial[1], forget) for rate, (retain, forget) in finals.items()}


# Setting -> method -> learning rate. Language: cross entropy in nats; arithmetic: accuracy.
UNLEARNING: Final[dict[str, dict[str, dict[float, Sweep]]]] = {
    "language": {
        "graddiff": _sweep(
            (4.9359, 3.4668),
            {
                1e-5: (5.0264, 30.5592),
                2e-5: (4.9924, 31.5783),
                3e-5: (4.9967, 32.3159),
                4e-5: (5.0085, 32.9097),
                5e-5: (5.0216, 33.5308),
                6e-5: (5.0334, 34.1291),
                7e-5: (5.0563, 34.685),
                8e-5: (5.0762, 35.129),
            },
        ),
        "maxent": _sweep(
            (4.9359, 3.4672),
            {
                1e-5: (4.9439, 11.3281),
                2e-5: (4.9397, 11.6977),
                3e-5: (4.942, 11.9844),
                4e-5: (4.9466, 12.1715),
                5e-5: (4.9551, 12.2584),
                6e-5: (4.9633, 12.3114),
                7e-5: (4.976, 12.3608),
                8e-5: (4.9895, 12.3808),
            },
        ),
        "rmu": _sweep(
            (4.9359, 3.4668),
            {
                1e-5: (5.4614, 7.2717),
                2e-5: (6.0976, 8.8457),
                3e-5: (6.8464, 9.8125),
                4e-5: (7.6585, 10.2192),
                5e-5: (8.4008, 10.6792),
                6e-5: (9.0205, 10.8073),
                7e-5: (9.4909, 10.958),
                8e-5: (9.8514, 11.2771),
            },
        ),
    },
    "arithmetic": {
        "graddiff": _sweep(
            (0.875, 0.8675),
            {
                6e-6: (0.9125, 0.8375),
                7e-6: (0.9075, 0.8325),
                8e-6: (0.815, 0.015),
                9e-6: (0.74, 0.0),
                1e-5: (0.7475, 0.0),
                2e-5: (0.1825, 0.0),
                3e-5: (0.8025, 0.28),
                4e-5: (0.79, 0.1775),
            },
        ),
        "maxent": {
            **_sweep(
                (0.875, 0.8675),
                {6e-5: (0.86, 0.1275), 7e-5: (0.83, 0.0525), 8e-5: (0.8075, 0.0175), 9e-5: (0.795, 0.0125)},
            ),
            **_sweep(
                (0.87, 0.87),
                {1e-4: (0.81, 0.035), 2e-4: (0.4825, 0.0), 3e-4: (0.045, 0.015), 4e-4: (0.005, 0.0225)},
            ),
        },
        "rmu": _sweep(
            (0.875, 0.8675),
            {
                6e-6: (0.7575, 0.2275),
                7e-6: (0.68, 0.1375),
                8e-6: (0.615, 0.0675),
                9e-6: (0.52, 0.035),
                1e-5: (0.4425, 0.025),
                2e-5: (0.14, 0.0),
                3e-5: (0.065, 0.0),
                4e-5: (0.05, 0.0),
            },
        ),
    },
}

# The rates whose models the paper distills (bold in B.1), by setting and method.
CHOSEN: Final[dict[str, dict[str, float]]] = {
    "language": {"graddiff": 6e-5, "maxent": 8e-5, "rmu": 3e-5},
    "arithmetic": {"graddiff": 8e-6, "maxent": 9e-5, "rmu": 8e-6},
}

# Share of the pretraining corpus that UNDO trains on at alpha = 0.6 (Appendix D.2.7: "around").
SHARE_AT_ALPHA_06: Final = {"language": 0.35, "arithmetic": 0.20}

# Its compute at the strongest setting, alpha = 0.8, against that of data filtering (abstract).
COMPUTE_AT_ALPHA_08: Final = (0.6, 0.8)

# Table 10: the points chosen on WMDP: experiment -> method -> rank by what it retains -> (alpha, learning rate).
POINTS: Final[dict[str, dict[str, dict[str, tuple[float, float]]]]] = {
    "wmdp_bio": {
        "rmu": {"best": (0.5, 5e-5), "medium": (0.3, 1e-4), "worst": (0.1, 1e-4)},
        "maxent": {"best": (0.3, 2e-5), "medium": (0.1, 2e-5), "worst": (0.75, 5e-5)},
    },
    "wmdp_cyber": {
        "rmu": {"best": (0.5, 2e-5), "medium": (0.2, 2e-5), "worst": (0.1, 2e-5)},
        "maxent": {"best": (0.2, 2e-5), "medium": (0.3, 3.5e-5), "worst": (0.3, 5e-5)},
    },
}

# Table 13: alpha -> MMLU after distillation, beta 0; alpha 0 is Gemma-2-2B as it was.
MMLU_AFTER_NOISE: Final = {0.0: 0.55, 0.25: 0.49, 0.35: 0.37, 0.6: 0.25}

# What UNDO costs on WMDP: points of MMLU accuracy, on average (Section 6, limitations).
MMLU_LOST: Final = 0.0488
