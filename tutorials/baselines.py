"""The two baselines of the paper's translation game that are methods of their own, S2P and SIL.

    python tutorials/baselines.py S2P --s2p_coef 1 --seed 3
    python tutorials/baselines.py SIL --sil_every 50 --sil_sender_steps 5 --sil_receiver_steps 8 --seed 3

All other flags are those of `python elastic_reset.py --help`, of which --task is translation and --method is
ppo unless it is given; a file of --config may have the baseline's settings too. The run's folder (default
runs/translation/S2P/seed3) gets the same files, config.json with the baseline's settings too, and --resume
true goes on where a run was stopped.

S2P, supervised self-play (Lowe et al. 2020; in this game Lu et al. 2020, arXiv 2003.12694). The sender
minimises, in every minibatch step,

    L_PPO(theta) - s2p_coef * mean_t log pi_theta(t-th token of the human English | French)

where the second mean is over the tokens of as many of the sender's pretraining pairs as the minibatch has
responses. The gradient of the sum is clipped as one. The published weights are 0.1, 1 and 5. It costs one
supervised pass more for each minibatch.

SIL, seeded iterated learning (Lu et al. 2020). The students are a sender and a receiver, at first the
pretrained ones. A generation has three steps:

    1. The teachers, which are copies of the students, play the game for sil_every updates. That is train().
       The students keep their weights.
    2. The student sender learns by maximum likelihood, for sil_sender_steps batches of the game's French, the
       English of the teacher sender. Then the student receiver learns, for sil_receiver_steps batches, the
       German that the teacher receiver gives for the student sender's English. Both languages are decoded
       greedily, as published, or sampled at sil_temperature.
    3. The students take the teachers' places.

The value head and the optimizers of the game keep their state from one generation to the next, while
imitation begins with a new AdamW each time. It costs the sil_sender_steps + sil_receiver_steps supervised
steps of a generation more, and the translations that they learn. The published numbers are 200 and 300 for
4,000 steps of the game, and the defaults keep to about that proportion. An evaluation at the end of a
generation measures the students, that is after step 3.

Beware of greedy texts where, as in the embedded game, there are several good translations. Students that see
one of them alone give up the others, generation by generation, and human English becomes less likely. That is
drift which no reward has caused."""

import argparse
import copy
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import elastic_reset
from elastic_reset import (
    Config,
    TranslationGame,
    adamw,
    configure,
    likelihood_loss,
    optimizer_step,
    parse_flags,
    respond,
    setting,
    shuffled,
)


@dataclass
class S2P(Config):
    s2p_coef: float = setting(1.0, "weight of the supervised loss", 0)


@dataclass
class SIL(Config):
    sil_every: int = setting(50, "updates of the game in a generation", 1)
    sil_sender_steps: int = setting(5, "steps in which the student sender imitates its teacher", 0)
    sil_receiver_steps: int = setting(8, "steps in which the student receiver imitates its teacher", 0)
    sil_batch_size: int = setting(128, "sentences of such a step", 1)
    sil_learning_rate: float = setting(1e-3, "AdamW's in such a step", 0, 1)
    sil_temperature: float = setting(0.0, "at which the texts to imitate are sampled; 0: greedily", 0, 100)


# ================================================== S2P ===================================================


class SupervisedSelfPlay(TranslationGame):
    """The game with a second loss of the sender in each minibatch step."""

    def __init__(self, config: S2P):
        super().__init__(config)
        self.taken = nn.Module()
        self.taken.register_buffer("minibatches", torch.tensor(0))  # in a module, so that checkpoints hold it
        self.trained = self.trained | dict(taken=self.taken)
        if not self.sender_pairs:
            raise ValueError("S2P needs the sender's pretraining pairs; name them by --sender_data")

    def backward(self, n):
        """Adds the gradient of s2p_coef times the supervised loss, on n pairs, to that of the policy."""
        self.taken.minibatches += 1
        config, accelerator = self.config, self.accelerator
        pairs = shuffled(self.sender_pairs, n, self.taken.minibatches.item(), config.seed)
        french, english = zip(*pairs[accelerator.process_index :: accelerator.num_processes], strict=True)
        texts = self.policy, self.tokenizer, list(french), list(english)
        loss = likelihood_loss(*texts, config.max_length)
        accelerator.backward(config.s2p_coef * loss)
        return dict(s2p_loss=loss.item())


# ================================================== SIL ===================================================


class SeededIteratedLearning(TranslationGame):
    """The game between teachers, `policy` and `receiver`, which train() trains as ever, and the students."""

    def __init__(self, config: SIL):
        super().__init__(config)
        students = dict(sender=copy.deepcopy(self.policy), receiver=copy.deepcopy(self.receiver))
        self.students = nn.ModuleDict(students)
        self.students.register_buffer("updates", torch.tensor(0))  # here, so that checkpoints hold it
        self.trained = self.trained | dict(students=self.students)

    def learn(self, prompts, responses):
        """After every update of the sender the receiver's and, every sil_every-th time, a new generation."""
        stats = super().learn(prompts, responses)
        self.students.updates += 1
        due = self.students.updates % self.config.sil_every == 0
        return stats | (self.new_generation() if due else {})

    def new_generation(self):
        """The students imitate the teachers and take their places. Returns the last step's losses."""
        sender, receiver, config = self.students["sender"], self.students["receiver"], self.config
        batches, losses = self.batches_of_french(), {}
        optimizer = adamw((sender, config.sil_learning_rate))
        for _ in range(config.sil_sender_steps):
            french = next(batches)
            english = self.say(self.policy, self.tokenizer, french, config.response_length)
            loss = self.imitate(sender, self.tokenizer, french, english, optimizer)
            losses["sil_sender_loss"] = loss
        optimizer = adamw((receiver, config.sil_learning_rate))
        for _ in range(config.sil_receiver_steps):
            english = self.say(sender, self.tokenizer, next(batches), config.response_length)
            german = self.say(self.receiver, self.receiver_tokenizer, english, config.max_length)
            loss = self.imitate(receiver, self.receiver_tokenizer, english, german, optimizer)
            losses["sil_receiver_loss"] = loss
        self.policy.load_state_dict(sender.state_dict())
        self.receiver.load_state_dict(receiver.state_dict())
        return losses

    def say(self, model, tokenizer, texts, length):
        how = dict(temperature=self.config.sil_temperature, max_length=self.config.max_length)
        _, responses = respond(model, tokenizer, texts, response_length=length, **how)
        return responses

    def batches_of_french(self):
        """This process's batches of the game's French: those of a generation follow those of the last."""
        config, accelerator = self.config, self.accelerator
        steps = config.sil_sender_steps + config.sil_receiver_steps
        first = (self.students.updates.item() // config.sil_every - 1) * steps + 1
        for number in range(first, first + steps):
            french = self.prompts(config.sil_batch_size, number)
            yield french[accelerator.process_index :: accelerator.num_processes]

    def imitate(self, student, tokenizer, sources, targets, optimizer):
        loss = likelihood_loss(student, tokenizer, sources, targets, self.config.max_length)
        self.accelerator.backward(loss)
        optimizer_step(student, optimizer, self.config, self.accelerator)
        return loss.item()


# ============================================== Command line ==============================================


BASELINES = {"S2P": S2P, "SIL": SIL}


SHARED = {f.name for f in fields(Config)}  # the settings of elastic_reset.py


def configure_baseline(baseline, method="ppo", **given) -> Config:
    """configure() with the baseline's own settings. Raises ValueError for what cannot be set."""
    own = {name: given.pop(name) for name in given.keys() - SHARED}
    given = dict(task="translation") | given
    if given["task"] != "translation":
        raise ValueError(f"--task is {given['task']}; {baseline} is a baseline of translation alone")
    folder = f"runs/translation/{baseline}/seed{given.get('seed', 0)}"
    given["output_dir"] = given.get("output_dir") or folder
    return BASELINES[baseline](**asdict(configure(method=method, **given)), **own)


def train_baseline(config: Config) -> dict:
    """Trains and writes the run's files, as elastic_reset.train() does, which raises the same errors."""
    task = SupervisedSelfPlay if isinstance(config, S2P) else SeededIteratedLearning
    return elastic_reset.train(config, task(config))


def own_settings(baseline):
    """The settings that a baseline adds to elastic_reset.py's."""
    return [f for f in fields(BASELINES[baseline]) if f.name not in SHARED]


def parse(argv):
    """The baseline's name, and all settings: the file of --config < the method < flags."""
    lines = ["settings of their own:"]
    owners = {}
    for baseline in BASELINES:
        for f in own_settings(baseline):
            owners[f"--{f.name}"] = baseline
            lines.append(f"  {baseline} --{f.name}: {f.metadata['help']} (default {f.default})")
    parser = argparse.ArgumentParser(
        "baselines.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("baseline", choices=BASELINES)
    known, rest = parser.parse_known_args(argv)
    baseline = known.baseline
    for word in rest:
        if owners.get(word.partition("=")[0], baseline) != baseline:
            raise ValueError(f"{word.removeprefix('--')} is not a setting of {baseline}")
    given = parse_flags(rest, BASELINES[baseline])
    if "method" not in given:
        given = parse_flags([*rest, "--method=ppo"], BASELINES[baseline])
    return baseline, given


def main(argv=None) -> int:
    """The command line; exit codes as those of elastic_reset.py."""

    def work():
        baseline, given = parse(sys.argv[1:] if argv is None else argv)
        train_baseline(configure_baseline(baseline, **given))

    return elastic_reset.exit_code("baselines.py", work)


if __name__ == "__main__":
    sys.exit(main())
