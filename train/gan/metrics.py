"""The names of a GAN's metrics."""

BEST = "heldout_frechet_distance"
"""Ranks checkpoints and trials; smaller is better."""

# How good generated images are: the metric's name in a report, and which way is better.
QUALITY = {
    "heldout_fid": ("FID", "lower"),
    "heldout_frechet_distance": ("Frechet distance", "lower"),
    "heldout_kid": ("KID", "lower"),
    "heldout_precision": ("precision", "higher"),
    "heldout_recall": ("recall", "higher"),
    "heldout_density": ("density", "higher"),
    "heldout_coverage": ("coverage", "higher"),
    "heldout_modes": ("modes", "higher"),
    "heldout_mode_kl": ("KL of the modes' fractions, nats", "lower"),
    "heldout_sliced_wasserstein": ("sliced Wasserstein distance of the pixels", "lower"),
}

QUALITY_METRICS = {
    name for metric in QUALITY for name in (metric, f"{metric}_baseline", f"{metric}_spread")
} | {"heldout_samples"}

HEADLINES = {
    "heldout_frechet_distance",
    "heldout_recall",
    "heldout_coverage",
    "heldout_fid",
}
