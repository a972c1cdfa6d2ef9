"""Every sampler of masked diffusion, some with several options, for tests that hold for all of them."""

from modeling_mcd.sampling_mdlm import SAMPLERS


# Each sampler with options under which several things happen in a step.
CASES = {
    "ancestral": {"steps": 4},
    "ancestral, greedy": {"steps": 4, "last_step": "greedy"},
    "ancestral, spread": {"steps": 4, "locking": "spread"},
    "first_hitting": {},
    "random": {"steps": 2},
    "confidence": {"steps": 2},
    "entropy": {"steps": 3, "order_temperature": 0.5},
    "margin": {"steps": 2, "order_temperature": 1.0},
    "dream": {"steps": 4, "order": "confidence"},
    "dream, margin": {"steps": 3, "order": "margin", "order_temperature": 0.5},
    "adaptive": {"threshold": 0.5, "max_tokens": 2},
    "entropy_bound": {"entropy_bound": 0.8},
    "remdm": {"steps": 6, "eta": 0.3},
    "remdm, confidence": {"steps": 6, "remasking": "confidence"},
    "remdm, loop": {"steps": 6, "remasking": "loop", "eta": 0.3},
    "remdm, spread": {"steps": 6, "eta": 0.3, "locking": "spread"},
    "psi": {"steps": 6, "kappa": 0.6},
}


def sampler_of(case: str):
    return SAMPLERS["absorbing"][case.split(",")[0]]
