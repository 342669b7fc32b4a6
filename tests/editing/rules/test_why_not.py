"""Each reason why rules leave a value alone: cases that it declines, and near neighbours that are safe."""

from pathlib import Path

import pytest

from vapr.editing.rules.categories import Value, load_categories
from vapr.editing.rules.turns import Turn
from vapr.editing.rules.why_not import NO_OPPOSITE, REASONS, why_not

SETS = [closed for category in load_categories().all for closed in category.values]

# question | answer with its [value] | what was said before. "+" marks what is safe
CASES = {
    "several claims": """
What color is the hat? | The hat is [red]. It has a logo.
What color is the bus? | The bus is [yellow], which is typical of school buses.
What color is the light? | The light is [red]; cars wait.
How many people are there? | There are [two] people: a man and a woman.
How many cups are there? | There are [three] cups (a red cup and a blue cup).
How many dogs are there? | There are [two] dogs – a big one and a small one.
What color is the hat? | The hat of the man in front of the door of the house on the hill near the river is [red].
+ What color is the hat? | The hat is [red].
+ What color is the hat? | In the image, the hat is [red].
+ How many people are there? | There are [two] people!
""",
    "a name": """
Who is it? | It is Mr [Black].
What house is this? | It is the [White] House.
What color is the bus? | The Bus is [red].
+ What color is the hat? | [Red]
+ What color is the hat? | THE HAT IS [RED]
+ How many dogs are there? | [Two] dogs are on the couch.
""",
    "another value in the answer": """
What color is the zebra? | The zebra is [black] and white.
What color is the hat? | The hat is [red] with a maroon band.
How many cats are there? | There are [two] cats and one dog.
How many cats are there? | There are [two] cats in 3 boxes.
What is the table made of? | The wooden table is made of [wood].
Where is the cat? | The cat is on the [left] side of the left chair.
+ What color is the hat? | The hat on the two boxes is [red].
+ Where is the red cup? | The red cup is on the [left].
""",
    "a word that rules do not know": """
What color is the light? | The light is [red] because cars wait.
What color is the hat? | The hat is not [red].
What color is the hat? | The hat is mostly [red].
How many dogs are there? | There are at least [two] dogs.
How many dogs are there? | There are about [ten] dogs.
How many dogs are there? | Both of the [two] dogs.
How many dogs are there? | Only [two] dogs
What is the cat doing? | The cat is [sitting] as usual.
What shape is the sign? | It looks [round].
+ What color is the man's shirt? | The man's shirt is [red].
+ How many dogs are there? | There are [two] dogs visible in the picture.
+ What is the cat doing? | The cat is [sitting] on the couch.
""",
    "not plainly said of a thing": """
What is in the bowl? | There is an [orange] in the bowl.
What is the ring made of? | The ring is of [gold].
What animal is this? | It is a [black] bear.
What drink is this? | It is a glass of [red] wine.
What color is the man? | The man is [black].
How big is the boy? | He is a [little] boy.
What is the book doing? | The book is [lying] on the table.
What is the bird doing? | The bird is [sitting] on a branch.
Who is it? | It is a [smiling] dog.
What number is on the bus? | The bus is at the gate [7].
How many dogs are there? | There is [one] dog.
Who is eating? | The man on the [left] has a hat.
+ What color is the bear? | The bear is [black].
+ What color is the car? | It is a [black] car.
+ What color is the cat? | It is an [orange] cat.
+ What is the dog doing? | The dog is [lying] on the table.
+ What do you see? | There is a man [sitting] on the bench.
+ How many dogs are there? | [One]
+ How many dogs are there? | There are [three].
+ Where is the man? | The man is on the [left].
""",
    "told by the question": """
Besides red, what color is the hat? | The hat is [blue].
Why is the red hat here? | The hat is [red].
What color is the crimson or maroon hat? | [Red]
How many of the three cups are red? | [Two]
How many of the 3 cups are red? | [Two] cups are red.
What is the wooden table made of? | The table is made of [wood].
Is the hat grey or silver? | [Grey]
+ Is the hat red or blue? | [Red]
+ How big is the dog? | The dog is [big].
+ How many dogs are on page 3? | [Two]
+ What color is the car next to the bus? | The car is [red].
""",
    "told by what the thing is": """
How many legs does the table have? | The table has [four] legs.
How many wheels are on the tricycle? | [Three]
How many sides does the table have? | [Four]
What color is the snow? | The snow is [white].
How big is the cloud? | The cloud is [big].
Where is the sun? | The sun is [behind] the hill.
Where is the boat? | The boat is [under] the bridge.
What is the man in the chair doing? | He is [sitting].
+ How many plates does the table have? | The table has [four] plates.
+ What color is the boat? | The boat is [white].
+ Where is the cat? | The cat is [behind] the door.
+ What is the man doing? | He is [sitting].
""",
    "a question that rules do not know": """
What color is the ripe tomato? | [Red]
What other color is on the bus? | [White]
How many twins are there? | [Two]
How many more dogs than cats are there? | [Two]
What color is the hat if it is not the one on the left? | [Red]
How many people are on the tandem? | There are [two] people.
+ What color is the tomato? | [Red]
+ How many dogs are there?\\nAnswer the question using a single word or phrase. | [Two]
""",
    "told by an earlier turn": """
What color is the car? | The car is [red]. | A man is next to a red car.
What color is the car? | [Red] | The car is maroon.
How many dogs are there? | There are [two] dogs. | I see 2 dogs.
+ What color is the car? | The car is [red]. | A man is next to a car.
+ How many dogs are there? | There are [two] dogs. | I see 3 cats.
""",
    NO_OPPOSITE: """
Is there a dog? | [Yes], there is a dog. It is brown.
Is there a dog? | [Yes], there are two dogs.
Is the dog there? | [Yes], the dog that is on the left is brown.
+ Is there a dog? | [Yes]
+ Is there a dog? | [No], there is no dog.
""",
}


def turn_of(question: str, answer: str, *earlier: str) -> Turn:
    said = [*(part for text in earlier for part in ("What is there?", text)), question]
    prompt = tuple({"role": ("user", "assistant")[n % 2], "content": [{"type": "text", "text": text}]}
                   for n, text in enumerate(said))  # fmt: skip
    image = Path("0.png")
    return Turn(0, 0, "rows.json:1", "row-0", "coco", None, (image,), ("0.png",), prompt, question, answer)


def marked(line: str) -> tuple[Turn, Value]:
    """Return the turn of a line, and the value in brackets."""
    question, answer, *earlier = line.removeprefix("+ ").replace("\\n", "\n").split(" | ")
    start, end = answer.index("["), answer.index("]") - 1
    text = answer[start + 1 : end + 1]
    closed = next(closed for closed in SETS if text.lower() in closed.members)
    turn = turn_of(question, answer.replace("[", "").replace("]", ""), *earlier)
    return turn, Value(closed, start, end, text, closed.members[text.lower()])


@pytest.mark.parametrize(
    ("reason", "line"), [(reason, line) for reason, table in CASES.items() for line in table.strip().splitlines()]
)
def test_reason(reason, line):
    assert why_not(*marked(line)) == (None if line.startswith("+ ") else reason)


def test_every_reason_has_its_table():
    assert set(CASES) == {*REASONS, NO_OPPOSITE}
