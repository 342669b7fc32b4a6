"""Answers whose values rules must leave alone, because the wrong answer would not be one, and those that they may edit."""

import time
from pathlib import Path

import pytest

from vapr.editing.draft.trades import LONG_QUESTION, Plan, Planner
from vapr.editing.rules.categories import load_categories
from vapr.editing.rules.nouns import Nouns
from vapr.editing.rules.turns import Turn

RULES = Planner(load_categories(), Nouns(), "swap", has_model=False)

# question | answer | the value that may not be traded; without one, none may
LEFT_ALONE = """
How many elephants are there? | There are eight elephants in the herd, five adults and three calves.
How many people are in the car? | Two people, a man and a woman, are in the car.
How many cups are there? | There are three cups - a red cup, a blue cup and a green cup.
How many cups are there? | There are three cups (a red cup, a blue cup and a green cup).
How many flags are there? | There are two flags, the American and the Canadian.
How many people are there? | A man and a woman, that is two people.
How many people are there? | There are two people. One is a man, the other a woman.
How many people are there? | There are two people. A man sits on the left and a woman stands on the right.
How many dogs are asleep? | Two of the three dogs are asleep.
How many slices are left? | There are two slices left out of eight.
How many cats are there? | There are 3 cats and all three are black.
How many benches are empty? | Both benches are empty, that is two.
How many zebras are there? | There are two zebras, the larger of which is drinking.
How many people are there? | There are as many as ten people.
How many people are there? | There is a minimum of ten people.
How many people are there? | There is a maximum of ten people.
How many people are there? | There are some ten people.
How many people are there? | There are possibly three people.
How many people are there? | There are probably three people.
How many people are there? | There are roughly three people.
How many people are there? | There are up to three people.
How many people are there? | There are no fewer than three people.
How many of the three cups are full? | Two
How many of the 3 cups are full? | Two cups are full.
What is the boy doing? | He is giving his father a high five.
How many phones are there? | An iPhone 6 lies on the table.
How many rockets are there? | This is Apollo 11 on the launch pad.
What color is the traffic light? | The traffic light is red, so cars must stop.
What color is the traffic light? | The traffic light is red. This means that cars must stop.
What color is the banana? | The banana is green, meaning it is unripe.
What color is the banana? | The banana is green, indicating that it is unripe.
What color is the banana? | The banana is green, which means that it is unripe.
What color is the banana? | The banana is green, suggesting that it is unripe.
What color is the light? | The light is green, allowing the cars to go.
What color is the sign? | The sign is yellow, making it easy to see.
What color are the leaves? | The leaves are orange, as it is autumn.
What color is the sky? | Because it rains, the sky is gray.
How big is the boat? | It is a small boat that can hold only two people.
What color are the bananas? | The bananas are green; they have to ripen.
What color are the bananas? | The bananas are yellow and ripe.
What color is the cup? | The cup is green, or maybe blue. | green
What color is the light? | The light is red so traffic has stopped.
What color is the light? | The green traffic light tells the cars to go.
What color are the leaves? | The leaves are orange as autumn has come.
What color is the wall? | The wall is blue like the sky.
How big is the boat? | It is a small boat for two people.
How big is the bus? | It is a large bus that seats many.
How long is the train? | It is a long train with many cars.
Where is the dog? | The dog is inside the car, behind the wheel. | inside
How big are the waves? | The waves are huge, perfect for surfing.
How big is the bed? | It is a large king-size bed.
What is the bird doing? | The bird is standing on one leg.
Besides red, what other color is on the flag? | Red
What color is the car that isn't red? | It is a red car.
What is the wooden table made of? | The table is made of wood.
What is the book doing? | The book is lying on the table.
Tell me about it. | The book is lying on the table.
Tell me about it. | A bottle is standing next to the plate. | standing
Tell me about the laptops. | They are sitting on the desk.
Tell me about it. | The man's bag is lying on the floor.
What is the engine doing? | The engine is walking.
Tell me about it. | The boys' bag is lying on the floor.
What is the man doing? | The gadget is lying on the table.
Tell me about it. | The water is running down the wall.
Tell me about it. | A fence is running along the road.
What is the man doing? | The man is throwing a frisbee to his dog.
Tell me about it. | He is peeling an orange for his son.
Tell me about it. | The orange has been peeled.
What is the ring made of? | The ring is made of silver.
Tell me about it. | The cake is topped with cream.
Tell me about it. | The woman has a tan.
Tell me about it. | This is J. K. Green.
Tell me about it. | Betty White is on the stage.
Tell me about it. | He is Professor Green.
Tell me about it. | The guitar is played by Jack Black.
Tell me about it. | It is a blue whale.
Tell me about it. | He checked his watch.
Tell me about it. | The people have gathered in the square.
Tell me about it. | He was hurt during the fall.
Tell me about it. | She looks a little sad.
Tell me about it. | There is a little milk in the glass.
Tell me about it. | He points at his big toe.
Tell me about it. | She holds up her little finger.
Tell me about it. | He holds the right tool.
Tell me about it. | It is the right size.
Where is it? | It is in the right place.
Tell me about it. | The glass holds the right amount of water.
Where is the cat? | Right in front of the house. | Right
Where is the cat? | Right under the table. | Right
Where is the cat? | Right by the door.
Where is the cat? | Right there.
Where is the cat? | Right next to the dog. | Right
Where is the cat? | Right behind the dog. | Right
Tell me about it. | He shouts at the top of his lungs.
Tell me about it. | The third bird from the left is yellow. | left
What color is the man's shirt? | The man's shirt is mostly blue.
What color is the woman wearing? | The woman is wearing black.
What color is the dog? | The dog is brown with a white collar.
What color is the sink? | It is a white porcelain sink.
What shape is the sign? | The sign has the shape of a triangle.
How big is the dog? | He has a big brown dog.
How many people are there? | Only two people are in the boat.
What are they doing? | They are walking.
Tell me about the bench. | He is sitting on the bench.
Tell me about it. | This is a bench with a man sitting on it.
Tell me about it. | The photo shows a man who is sitting on a bench.
How many dogs are on page 3 of the book? | There are two dogs.
How many dogs are there? (7) | There are two dogs.
"""

# question | answer | the value that may be traded
KEPT = """
What color is the car? | Red | Red
What color is the car? | The car is red. | red
What color is the car? | It is a red car. | red
What color is the man's shirt? | The man in the image is wearing a blue shirt. | blue
What color is the cat? | It is an orange cat. | orange
What pattern is on the shirt? | He wears a checked shirt. | checked
What shape is the mirror? | The mirror is round. | round
How big is the dog? | It is a small dog. | small
How big is the dog? | The dog is little. | little
How many dogs are there? | There are three dogs on the beach. | three
How many dogs are there? | Three | Three
How many dogs are there? | There are 3 dogs. | 3
What is the man doing? | He is sitting on a bench. | sitting
What is the man in the vest doing? | The man in the vest is standing. | standing
What is the cat doing? | It is lying on the bed. | lying
What are the children doing? | Sitting | Sitting
What are the women doing? | They are walking along the river. | walking
What is the woman doing? | She is pulling a suitcase across the square. | pulling
What is the boy doing? | The boy is throwing a ball. | throwing
Where is the lamp? | On the left. | left
Where is the lamp? | Right | Right
Where is the lamp? | The lamp is on the right side of the bed. | right
Where is the lamp? | To the left of the bed. | left
Which hand holds the pen? | His left hand holds the pen. | left
Where is the cat? | At the top of the stairs. | top
What season is it? | It is in the fall. | fall
What room is this? | It is a kitchen. | kitchen
Is the car red or blue? | The car is red. | red
Are there two or three dogs? | There are two dogs. | two
How many dogs are in image 12? | There are two dogs. | two
"""


def lines(table: str) -> list[str]:
    return table.strip().splitlines()


def planned(question: str, answer: str, *earlier: str) -> Plan:
    """The plan of an answer after earlier questions and answers."""
    said = [*earlier, question]
    prompt = tuple({"role": ("user", "assistant")[n % 2], "content": [{"type": "text", "text": text}]}
                   for n, text in enumerate(said))  # fmt: skip
    return RULES.by_rules(
        Turn(0, 0, "rows.json:1", "row-0", "coco", None, (Path("0.png"),), ("0.png",), prompt, question, answer), 0
    )


def offered(question: str, answer: str) -> list[str]:
    return [offer.value.text for offer in planned(question, answer).offers]


@pytest.mark.parametrize("line", lines(LEFT_ALONE))
def test_left_alone(line):
    question, answer, *value = line.split(" | ")
    left = offered(question, answer)
    assert value[0] not in left if value else left == []


@pytest.mark.parametrize("line", lines(KEPT))
def test_kept(line):
    *said, value = line.split(" | ")
    assert value in offered(*said)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Besides red, what other color is on the flag?", "Blue"),
        ("What color is the car that isn't red?", "The car is blue."),
        ("What room is this if not a kitchen?", "Bathroom"),
    ],
)
def test_a_question_that_names_another_value_is_left_alone(question, answer):
    assert planned(question, answer).offers == []


def test_of_a_choice_the_other_one_does():
    (offer,) = planned("Is the car red or blue?", "Red").offers
    assert offer.targets == {"blue"}


@pytest.mark.parametrize(
    ("earlier", "question", "answer", "left_alone"),
    [
        ("A man is standing next to a red car.", "What color is the car?", "The car is red.", True),
        ("A man is standing next to a red car.", "What color is the car?", "Red", True),
        ("A man is standing next to a red car.", "What color is it?", "It is red.", True),
        ("A man in a red hat is standing here.", "What color is the car?", "The car is red.", True),
        ("A man is standing next to a car.", "What color is the car?", "The car is red.", False),
        ("I see 2 dogs.", "How many dogs are there?", "There are two dogs.", True),
        ("I see 2 cats.", "How many dogs are there?", "There are two dogs.", True),
        ("I see 3 cats.", "How many dogs are there?", "There are two dogs.", False),
    ],
)
def test_what_an_earlier_turn_has_said(earlier, question, answer, left_alone):
    assert (planned(question, answer, "What is there?", earlier).offers == []) == left_alone


def test_the_plan_says_why():
    plan = planned("What color is the light?", "The light is red because it is late.")
    assert plan.reason == "needs a language model: a word that rules do not know" and plan.offers == []


def test_a_very_long_question_is_left_out_at_once():
    began = time.monotonic()
    plan = planned("What is the man who is next to the " * 6000 + "?", "Red")
    assert plan.reason == LONG_QUESTION and time.monotonic() - began < 1


EVERYDAY = [line for line in (Path(__file__).parent / "everyday.txt").read_text().splitlines() if line[0] != "#"]


@pytest.mark.parametrize("line", EVERYDAY)
def test_everyday_rows(line):
    question, answer, expected = line.replace("\\n", "\n").split(" | ")
    plan = planned(question, answer)
    reason = (plan.reason or "").removeprefix("needs a language model: ")
    assert (", ".join(offer.value.text for offer in plan.offers) or f"({reason})") == expected
