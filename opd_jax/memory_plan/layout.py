"""How many devices a run has along each axis of its mesh, and what each of them holds."""

import dataclasses

from ml_collections import ConfigDict

from opd_jax.sharding import partition
from opd_jax.sharding.mesh import Mesh, make_abstract_mesh

_OF_ONE_FAMILY = 1_000  # ids by which vocabularies of one tokenizer family differ at most
_ALL = 10**9  # held-out problems where all are measured: the plan opens no file


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the mesh, and which roles' compute weights are sharded.

    Rows and slots are divided over `data` x `fsdp`, heads and MLP over `tensor`; the vocabulary is whole.
    The float32 state is sharded like the weights, and over data x fsdp as well. `student`, `teacher`,
    `reference`: compute weights "replicated" over data x fsdp, or "sharded" over fsdp.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    student: str = "replicated"
    teacher: str = "replicated"
    reference: str = "replicated"

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.fsdp * self.tensor

    @property
    def sizes(self) -> partition.Sizes:
        """Devices along each axis."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}

    @property
    def rows(self) -> int:
        """Devices that rows are divided over."""
        return self.data * self.fsdp

    @property
    def mesh(self) -> Mesh:
        """A mesh of these sizes whose devices are abstract."""
        sharded = [role for role in partition.ROLES if getattr(self, role) == "sharded"]
        return make_abstract_mesh(self.sizes, sharded)


def layout_of(config: ConfigDict, devices: int) -> Layout:
    """The config's mesh on so many devices.

    Raises ConfigError: axes that do not multiply to the number of devices.
    """
    section = config.mesh
    roles = {role: section[role] for role in partition.ROLES}
    return Layout(partition.data_size(section, devices), section.fsdp, section.tensor, **roles)
