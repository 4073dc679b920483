"""What the demo runs: settings, the variants it compares, and the counts that follow from them."""

from dataclasses import dataclass

from adaselect_kernels.checks import selected_count

TEST_SAMPLES = 360  # of 1797 images
TRAIN_SAMPLES = 1437


@dataclass(frozen=True)
class Variant:
    """One way to train: a policy of `get_policy`, None for no selection, and AdaSelection's candidate methods."""

    label: str
    policy: str | None = None
    methods: tuple[str, ...] = ()
    scored: bool = True  # the policy looks at the losses; False spares the scoring forward


# AdaSelection runs at the paper's defaults with two sets of candidates: big loss, uniform, and the one its label names. With
# small loss it is the library's default. On a task that is learnt to a loss near zero its weights tend to small_loss, whose
# method loss fluctuates least (equation 3 lowers the weight of a method whose loss fluctuates), and then the rows already
# learnt are chosen. Both are shown, so that the choice of candidates is seen to matter.
VARIANTS = (
    Variant("no selection"),
    Variant("uniform", "uniform", scored=False),
    Variant("big loss", "big_loss"),
    Variant("AdaSelection + small loss", "adaselection", ("big_loss", "small_loss", "uniform")),
    Variant("AdaSelection + grad norm", "adaselection", ("big_loss", "grad_norm", "uniform")),
)


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo; the last images of an epoch that do not fill a candidate batch are skipped in that epoch.

    epochs: passes over the candidates. gamma: share chosen, in (0, 1]. repeats: runs of every variant, seeds seed, seed+1, ...
    batch_size: of the candidate batches and of the updates. The paper's: batch 128, SGD with momentum 0.9.

    Raises ValueError or TypeError for a value outside what is accepted.
    """

    epochs: int = 20
    gamma: float = 0.3
    repeats: int = 3
    seed: int = 0
    batch_size: int = 128
    width: int = 32  # channels of the first two convolutions
    learning_rate: float = 0.1  # the largest of a one-cycle schedule, which counts updates
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        selected_count(self.gamma, self.batch_size)
        for name, least in (("epochs", 1), ("repeats", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not 1 <= self.batch_size <= TRAIN_SAMPLES:
            raise ValueError(f"batch_size must be in [1, {TRAIN_SAMPLES}], got {self.batch_size!r}")

    @property
    def batches_per_epoch(self) -> int:
        return TRAIN_SAMPLES // self.batch_size

    @property
    def candidates(self) -> int:
        """Candidate samples that every variant sees."""
        return self.epochs * self.batches_per_epoch * self.batch_size

    def updates(self, variant: Variant) -> int:
        """Optimizer steps: one a full batch of chosen samples; what is left at the end is not trained on."""
        batches = self.epochs * self.batches_per_epoch
        chosen = self.batch_size if variant.policy is None else selected_count(self.gamma, self.batch_size)
        return batches * chosen // self.batch_size

    def expected_time_ratio(self, variant: Variant) -> float:
        """(s + 3 gamma) / 3, the time over that without selection: s = 1, a scoring forward costs a training forward."""
        scoring = 1.0 if variant.scored else 0.0
        return 1.0 if variant.policy is None else (scoring + 3 * self.gamma) / 3
