"""TRD in the shape of NeMo-Aligner's examples. Settings: conf/gpt_trd.yaml.

torchrun --nproc-per-node 8 train_gpt_trd.py pretrained_checkpoint.restore_from_path=... \
    model.trd.model.teacher.path=... "model.data.train=problems.jsonl"
"""

from lightning.pytorch import Trainer
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from nemo_aligner.utils.train_script_utils import CustomLoggerWrapper
from omegaconf import DictConfig, OmegaConf

from nemo_trd.adapters.aligner_config import config_from_aligner
from nemo_trd.adapters.nemo_aligner import AlignerTracker, TRDStudent, TRDTrainer
from nemo_trd.config.errors import ConfigError
from nemo_trd.records.last_line import end_process
from nemo_trd.run.run import Run
from nemo_trd.train import launch


def fit(run: Run) -> int:
    return TRDTrainer(TRDStudent(run)).fit()


@hydra_runner(config_path="conf", config_name="gpt_trd")
def main(cfg: DictConfig) -> None:
    try:
        config = config_from_aligner(cfg)
        # Holds the loggers of the experiment manager, and trains nothing.
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        exp_manager(trainer, cfg.exp_manager)
        logger = CustomLoggerWrapper(trainer.loggers)
        logger.log_hyperparams(OmegaConf.to_container(cfg))
        raise SystemExit(launch(config, fit, [AlignerTracker(logger)]))
    except ConfigError as error:
        end_process(f"nemo_trd: {error}", 2)


if __name__ == "__main__":
    main()
