"""The `fewshot` workload: solved examples first, then one more question.

The examples are those of MMLU (flan-CoT), BIG-Bench Hard (CoT) and GSM8K (CoT) that the package
`lm-eval` (MIT) carries in its task files: 57, 23 and one head. (Of BIG-Bench Hard's 27 tasks some
have the same head.) The package does not carry the test questions, so the questions are made:

- MMLU and BIG-Bench Hard: what the other heads of the family give as examples, without their
  answers and without any that the head itself has. So a question is as long as a real one and
  shaped like one, but of another subject than its head: measure speed on it, not skill.
- GSM8K: the head's own questions with every number replaced by another of as many digits.

MMLU asks for the letter (8 tokens), the two others for reasoning (128 tokens).

    pip download --no-deps --dest wheels lm-eval==0.4.13
    python datasets/fewshot.py wheels/lm_eval-*.whl out.parquet
"""

import argparse
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from describe_text import describe, shuffle, table_of

TEMPLATE = "{{ head }}\n\n{{ question }}"
NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBER = re.compile(r"\b(\d+|" + "|".join(NUMBER_WORDS) + r")\b", re.IGNORECASE)

SCHEMA = pa.schema(
    [
        pa.field("head", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("max_tokens", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Task:
    """A task's description and examples, each a question and its answer."""

    name: str
    description: str
    examples: tuple[tuple[str, str], ...]

    @property
    def questions(self) -> list[str]:
        return [question for question, _ in self.examples]

    def head(self, answer: str) -> str:
        shots = [f"Q: {question}{answer}{target}" for question, target in self.examples]
        return "\n\n".join([self.description, *shots] if self.description else shots)


def from_other_tasks(
    task: Task, tasks: list[Task], count: int, rng: np.random.Generator
) -> list[str]:
    """At most `count` questions that other heads answer and this one does not."""
    distinct = dict.fromkeys(question for other in tasks for question in other.questions)
    pool = [question for question in distinct if question not in task.questions]
    return [pool[i] for i in rng.permutation(len(pool))[:count]]


def with_other_numbers(
    task: Task, tasks: list[Task], count: int, rng: np.random.Generator
) -> list[str]:
    """At most `count` distinct questions that are the head's own but for their numbers."""
    found: dict[str, None] = {}
    for _ in range(20 * count):  # more than enough: few come twice
        question = vary_numbers(task.questions[rng.integers(len(task.questions))], rng)
        if question not in task.questions and len(found) < count:
            found[question] = None
    return list(found)


def vary_numbers(question: str, rng: np.random.Generator) -> str:
    """Replaces every number by one of as many digits, every number word by another."""

    def other(match: re.Match[str]) -> str:
        if match[0].isdigit():
            low = 10 ** (len(match[0]) - 1)
            return str(rng.integers(low, 10 * low))
        word = NUMBER_WORDS[rng.integers(len(NUMBER_WORDS))]
        return word.capitalize() if match[0][0].isupper() else word

    return NUMBER.sub(other, question)


Questions = Callable[[Task, list[Task], int, np.random.Generator], list[str]]


@dataclass(frozen=True, slots=True)
class Family:
    """Tasks of one form: where they are, and how a question and its answer are written.

    `files` matches paths below lm_eval/tasks; `answer` leads to an example's answer, `ask` stands
    in its place after the question that is to be answered; `questions` makes those.
    """

    files: re.Pattern[str]
    answer: str
    ask: str
    max_tokens: int
    questions: Questions


FAMILIES = {
    "mmlu": Family(
        re.compile(r"mmlu/flan_cot_fewshot/mmlu_\w+\.yaml"),
        "\nA: ",
        "\nA: The answer is",
        8,
        from_other_tasks,
    ),
    "bbh": Family(
        re.compile(r"bbh/cot_fewshot/[a-z]\w*\.yaml"),
        "\nA: Let's think step by step.\n",
        "\nA: Let's think step by step.",
        128,
        from_other_tasks,
    ),
    "gsm8k": Family(re.compile(r"gsm8k/gsm8k-cot\.yaml"), "\nA: ", "\nA:", 128, with_other_numbers),
}


def read_tasks(wheel: Path, family: Family) -> list[Task]:
    """Reads a family's tasks out of the wheel, one for each head, in the order of their names.

    Raises:
        ValueError: the wheel has none.
    """
    root = "lm_eval/tasks/"
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if family.files.fullmatch(n[len(root) :]))
        tasks = [parse_task(yaml.safe_load(archive.read(name))) for name in names]
    if not tasks:
        raise ValueError(f"{wheel} has no {family.files.pattern}; is it lm-eval's wheel?")
    return list({task.head(family.answer): task for task in tasks}.values())


def parse_task(content: dict[str, Any]) -> Task:
    """Takes from a task file what a head is made of."""
    examples = tuple(
        ((sample.get("question") or sample["input"]).strip(), sample["target"].strip())
        for sample in content["fewshot_config"]["samples"]
    )
    return Task(content["task"], content.get("description", "").strip(), examples)


def build(families: list[tuple[Family, list[Task]]], *, count: int, seed: int = 0) -> pa.Table:
    """Makes the table: up to `count` questions to each head, shuffled."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[str | int, ...]] = [
        (task.head(family.answer), f"Q: {question}{family.ask}", task.name, family.max_tokens)
        for family, tasks in families
        for task in tasks
        for question in family.questions(task, tasks, count, rng)
    ]
    return shuffle(table_of(rows, SCHEMA), seed)


def main() -> None:
    """Command line: the wheel, where to write, and which heads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path, help="wheel of the package lm-eval")
    parser.add_argument("out", type=Path, help="Parquet file to write")
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--questions", type=int, default=64, help="at most, to each head")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.questions < 1:
        parser.error(f"--questions is {arguments.questions}; it must be at least 1")
    chosen = [FAMILIES[name] for name in arguments.family]
    try:
        families = [(family, read_tasks(arguments.wheel, family)) for family in chosen]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        parser.error(str(error))
    table = build(families, count=arguments.questions, seed=arguments.seed)
    pq.write_table(table, arguments.out, compression="zstd")
    print(f"{arguments.out}: {describe(table, TEMPLATE)}")


if __name__ == "__main__":
    main()
