"""The entry decorator of NeMo where nemo_toolkit is installed, Hydra's own elsewhere.

Both take the same overrides. nemo_toolkit 3 has no Megatron models any more: `hydra_runner`, its
logging and its experiment manager are what it still has for a run of TRD. Extra: `[nemo]`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import hydra

from nemo_trd.config.load import conf_dir, with_free_keys

Task = Callable[..., None]


def hydra_entry(task: Task) -> Callable[[], Any]:
    """`task`, called with what Hydra composes of conf/config.yaml and the command line.

    Importing NeMo takes seconds, so this is called when the program starts, not on import. It
    changes `sys.argv`, from which both take their overrides; see `config.load.with_free_keys`.
    """
    sys.argv[1:] = with_free_keys(sys.argv[1:])
    where = str(conf_dir().resolve())
    if not has_hydra_runner():
        return hydra.main(config_path=where, config_name="config", version_base="1.3")(task)
    from nemo.core.config import hydra_runner

    return hydra_runner(config_path=where, config_name="config")(task)


def has_hydra_runner() -> bool:
    # Without `nemo`, asking for `nemo.core` would raise; and other distributions are called so.
    nemo = importlib.util.find_spec("nemo")
    return nemo is not None and importlib.util.find_spec("nemo.core.config") is not None
