import dataclasses

from ..._internal.checks import check_flag, check_number, check_value, FRACTION
from .._config import check_sizes, check_tuple


@dataclasses.dataclass(frozen=True)
class MDEQConfig:
    """The sizes of a [`implicitnets.models.MDEQ`][] or an `MDEQSegmenter`.

    **Raises:**

    `ValueError` for sizes that do not go together.
    """

    channels: tuple[int, ...] = (24, 24)
    """How many channels the state has at each scale, from the finest to the coarsest.
    Each scale has half the height and width of the one before. With a single scale the
    cell is one residual block."""
    head_channels: tuple[int, ...] = (8, 16)
    """A quarter of the channels that the classifier's head has at each scale."""
    final_channels: int = 200
    """How many channels the classifier has before its last layer."""
    num_classes: int = 10
    """The number of logits."""
    num_downsamples: int = 0
    """How many times the stem halves height and width."""
    expansion: int = 5
    """How many times wider a block of the cell is inside than outside."""
    groups: int = 8
    """How many groups each group normalisation has."""
    kernel_size: int = 3
    """The kernel size of the convolutions in the blocks."""
    dropout: float = 0.25
    """The probability with which a block drops a channel."""
    normalise_weights: bool = True
    """Whether the blocks and the last layers of the cell have weight normalisation."""
    post_fuse_affine: bool = False
    """Whether the last normalisations of the cell have weights."""
    in_channels: int = 3
    """How many channels an image has."""

    def __post_init__(self):
        num_scales = check_tuple(self, "channels", "positive integers, at least one")
        some = num_scales > 0
        check_value(self, "channels", self.channels, some, "positive, at least one")
        head = f"positive integers, one for each of the {num_scales} scales"
        check_tuple(self, "head_channels", head, num_scales)
        check_sizes(self, "final_channels", "num_classes", "expansion", "in_channels")
        check_sizes(self, "kernel_size", "groups")
        check_sizes(self, "num_downsamples", least=0)
        check_number(self, "dropout", self.dropout, FRACTION)
        check_flag(self, "normalise_weights", self.normalise_weights)
        check_flag(self, "post_fuse_affine", self.post_fuse_affine)
        odd = self.kernel_size % 2 == 1
        check_value(self, "kernel_size", self.kernel_size, odd, "odd and positive")
        # Behind the fusion there are half as many groups.
        groups = [self.groups] + [self.groups // 2] * (len(self.channels) > 1)
        check_value(
            self,
            "groups",
            self.groups,
            min(groups) >= 1
            and all(channels % n == 0 for channels in self.channels for n in groups),
            f"a divisor of all of the channels {self.channels}, and so must half of it "
            "if there are several scales",
        )

    @classmethod
    def cifar_tiny(cls) -> "MDEQConfig":
        """For CIFAR-10 without augmentation; 158,890 parameters."""
        return cls()

    @classmethod
    def cifar_large(cls) -> "MDEQConfig":
        """For CIFAR-10; 11,097,438 parameters."""
        return cls(
            channels=(32, 64, 128, 256),
            head_channels=(14, 28, 56, 112),
            final_channels=1680,
            dropout=0.3,
        )

    @classmethod
    def cifar_large_regularised(cls) -> "MDEQConfig":
        """`cifar_large`, for training with [`implicitnets.jacobian_penalty`][]."""
        return dataclasses.replace(cls.cifar_large(), dropout=0.22)

    @classmethod
    def imagenet_small(cls) -> "MDEQConfig":
        """For ImageNet; 16.8 million parameters."""
        return cls._imagenet((32, 64, 128, 256), (24, 48, 96, 192))

    @classmethod
    def imagenet_small_regularised(cls) -> "MDEQConfig":
        """`imagenet_small` with a wider head, for training with the penalty."""
        return dataclasses.replace(
            cls.imagenet_small(),
            head_channels=(28, 56, 112, 224),
            dropout=0.02,
            post_fuse_affine=False,
        )

    @classmethod
    def imagenet_large(cls) -> "MDEQConfig":
        """For ImageNet; 67.1 million parameters."""
        return cls._imagenet((80, 160, 320, 640), (32, 64, 128, 256))

    @classmethod
    def imagenet_large_regularised(cls) -> "MDEQConfig":
        """`imagenet_large`, for training with [`implicitnets.jacobian_penalty`][]."""
        return dataclasses.replace(cls.imagenet_large(), post_fuse_affine=False)

    @classmethod
    def imagenet_xl(cls) -> "MDEQConfig":
        """For ImageNet; 90.5 million parameters."""
        channels = (88, 176, 352, 704)
        return cls._imagenet(channels, (32, 64, 128, 256), expansion=6)

    @classmethod
    def cityscapes_small(cls) -> "MDEQConfig":
        """For Cityscapes, by an `MDEQSegmenter`."""
        config = cls.imagenet_small()
        return dataclasses.replace(config, num_classes=19, dropout=0.05)

    @classmethod
    def cityscapes_large(cls) -> "MDEQConfig":
        """For Cityscapes, by an `MDEQSegmenter`."""
        config = cls.imagenet_large()
        return dataclasses.replace(config, num_classes=19, dropout=0.03)

    @classmethod
    def cityscapes_xl(cls) -> "MDEQConfig":
        """For Cityscapes, by an `MDEQSegmenter`."""
        config = cls.imagenet_xl()
        return dataclasses.replace(config, num_classes=19, dropout=0.04)

    @classmethod
    def _imagenet(
        cls,
        channels: tuple[int, ...],
        head_channels: tuple[int, ...],
        expansion: int = 5,
    ) -> "MDEQConfig":
        return cls(
            channels=channels,
            head_channels=head_channels,
            final_channels=2048,
            num_classes=1000,
            num_downsamples=2,
            expansion=expansion,
            dropout=0.0,
            post_fuse_affine=True,
        )
