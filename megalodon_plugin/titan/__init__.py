"""The torchtitan 0.2 adapter. Importing it registers the train spec "megalodon":

[experimental]
custom_import = "megalodon_plugin.titan"
"""

from . import cpu

if cpu.needs_cpu():
    cpu.use_cpu()  # before anything below imports torchtitan

from torchtitan.protocols.train_spec import register_train_spec

from .train_spec import megalodon_train_spec

register_train_spec("megalodon", megalodon_train_spec())
