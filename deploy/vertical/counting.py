"""How many parameters a vertical model has beside a full one, as the paper counts them.

    ratio = [C (12 D^2 + b D) + (L - C) (16 D r + b D) + E] / [L (12 D^2 + b D) + E]

for a vision transformer of L layers of width D with MLPs of 4 D, in C chunks, with increments of
rank r on qkv, proj, fc1 and fc2 (D + 3D, D + D, D + 4D, 4D + D features: 16 D r), b D biases and
norms of a layer, and E parameters outside the layers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ViTGeometry:
    """A vision transformer; the defaults are ViT-B/16 at 224, 1,000 classes, no qkv bias."""

    hidden_size: int = 768
    num_layers: int = 12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    num_classes: int = 1000
    qkv_bias: bool = False

    @property
    def full_layer(self) -> int:
        """Four matrices, and what `small_of_layer` counts."""
        return 12 * self.hidden_size**2 + self.small_of_layer

    @property
    def small_of_layer(self) -> int:
        """Biases of proj, fc1, fc2 and perhaps qkv, weights and biases of two norms."""
        return (13 if self.qkv_bias else 10) * self.hidden_size

    @property
    def outside_layers(self) -> int:
        """Patch embedding, class token, positions, the last norm, the head."""
        patch = self.num_channels * self.patch_size**2
        places = (self.image_size // self.patch_size) ** 2 + 1
        embedding = (patch + 1 + 1 + places) * self.hidden_size
        return embedding + 2 * self.hidden_size + (self.hidden_size + 1) * self.num_classes


def increment_of_layer(hidden_size: int, rank: int) -> int:
    """A and B of the four matrices of one layer."""
    return rank * sum(
        inputs + outputs
        for inputs, outputs in (
            (hidden_size, 3 * hidden_size),
            (hidden_size, hidden_size),
            (hidden_size, 4 * hidden_size),
            (4 * hidden_size, hidden_size),
        )
    )


def vertical_parameters(geometry: ViTGeometry, num_chunks: int, rank: int) -> int:
    """Parameters of the vertical model."""
    later = geometry.num_layers - num_chunks
    own = increment_of_layer(geometry.hidden_size, rank) + geometry.small_of_layer
    return num_chunks * geometry.full_layer + later * own + geometry.outside_layers


def full_parameters(geometry: ViTGeometry) -> int:
    """Parameters of the model whose layers are all full."""
    return geometry.num_layers * geometry.full_layer + geometry.outside_layers


def parameter_ratio(geometry: ViTGeometry, num_chunks: int, rank: int) -> float:
    """Vertical by full."""
    return vertical_parameters(geometry, num_chunks, rank) / full_parameters(geometry)
