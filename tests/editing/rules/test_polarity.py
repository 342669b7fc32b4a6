"""Yes and no turned round by rules, and the sentences that rules must leave to a model."""

import pytest

from vapr.editing.rules.operations import apply
from vapr.editing.rules.polarity import flip

FLIPPED = """
Yes, there are people here. | No, there are no people here.
Yes, there are some people here. | No, there are no people here.
Yes | No
**Yes** | **No**
YES! | NO!
“Yes, it is.” | “No, it is not.”
Yes, there is a dog in the yard. | No, there is no dog in the yard.
Yes there is an owl. | No there is no owl.
Yes, there is water in the glass. | No, there is no water in the glass.
Yes, there is a man who is wearing a hat. | No, there is no man who is wearing a hat.
Yes, the man is wearing a helmet. | No, the man is not wearing a helmet.
Yes, they are. | No, they are not.
No, there is no dog in the yard. | Yes, there is a dog in the yard.
No, there is no elephant. | Yes, there is an elephant.
No, there is no fire hydrant. | Yes, there is a fire hydrant.
No, there is no traffic light. | Yes, there is a traffic light.
No, there is no snow on the ground. | Yes, there is some snow on the ground.
No, there are no dogs. | Yes, there are some dogs.
No, there isn't a dog. | Yes, there is a dog.
No, the man is not wearing a helmet. | Yes, the man is wearing a helmet.
No, he isn’t smiling. | Yes, he is smiling.
No, they aren't. | Yes, they are.
No, he cannot. | Yes, he can.
No, there is no fruit on the table. | Yes, there is some fruit on the table.
No, there is no pasta on the plate. | Yes, there is some pasta on the plate.
No, there is no silverware. | Yes, there is some silverware.
Yes, there is. | No, there is not.
Yes there is | No there is not
Yes, there are. | No, there are not.
Yes, there was! | No, there was not!
No, there is not. | Yes, there is.
No, there isn't. | Yes, there is.
No, there isn’t. | Yes, there is.
No, there are not. | Yes, there are.
No, there aren't. | Yes, there are.
No, there weren't. | Yes, there were.
No there is not. | Yes there is.
Yes, it is. | No, it is not.
Yes, it does. | No, it does not.
Yes, they do. | No, they do not.
Yes, he did. | No, he did not.
Yes, she has. | No, she has not.
Yes, the man does. | No, the man does not.
Yes, I can. | No, I cannot.
No, it doesn't. | Yes, it does.
No, they do not. | Yes, they do.
No, there is not a dog in the yard. | Yes, there is a dog in the yard.
No, there are not dogs in the yard. | Yes, there are dogs in the yard.
"""
LEFT_ALONE = """
Yes, there are two people here.
Yes, I can see two dogs.
The dog is brown.
No. 5 is the bus to the station.
No dogs are visible.
Nobody is there.
Yesterday it was raining.
Yes, the dog that is on the left is brown.
Yes, the man who is riding has a helmet.
Yes, what looks like a dog is here.
Yes, the man has a helmet.
Yes, there is a dog. It is brown.
Yes. There is a dog.
Yes, there is a dog, and it is brown.
Yes, there is a dog and a cat.
Yes, the sky is clear and the sun is shining.
Yes, the dog is brown, right?
Yes, the light is on, isn't it?
Yes, is it?
Yes, both men are smiling.
Yes, all of them are here.
Yes, everyone is smiling.
Yes, one of the men is wearing a hat.
Yes, a man is standing there.
Yes, there is another dog.
Yes, there is something on the table.
Yes, there is also a cat.
Yes, there is currently a cat.
Yes, there are a few cars.
Yes, there are a lot of cars.
Yes, there is at least one dog.
Yes, there is only one dog.
Yes, there is probably a dog.
Yes, the cat is still sleeping.
Yes, it is not raining.
Yes, there is the dog.
YES, THERE IS A DOG.
YES, THERE IS.
Yes, there are two.
Yes, there is one.
Yes, there is not.
Yes, there is indeed.
Yes, there's some on the plate.
Yes, he must have.
Yes, it has to be.
Yes, what he says is.
Yes, somebody does.
Yes, the dog has a collar.
No, the dog does not have a collar.
No, there is no dog at all.
No, there is not at all.
No, there isn't a single dog.
No, there is not much traffic.
No, there isn't any.
No, there isn't one.
No, but there is a cat.
No, there is a cat instead.
No, the sky is cloudy.
No, it is a cat.
No, there are not any dogs.
No, there aren't any dogs.
No, there is none.
No, there is no red car.
No, there is no need to wait.
No, there is no other dog.
No, there is no dog or cat.
No, there is no longer a dog.
No, the dog is not on the sofa, it is on the bed.
No, the dog is not on the sofa; it is on the bed.
No, the dog is not brown. It is black.
No, the dog that is not brown is here.
No, the vase is not empty at all.
No, they are not all wearing hats.
No, the man is not wearing a hat or glasses.
No, she is not smiling nor laughing.
No, not yet.
No, not all of them are.
No, nobody is there.
Yes, the soda can says Coke.
Yes, the soda can looks full.
Yes, the can appears empty.
Yes, the can contains beer.
No, he isn't wearing a hat – he has a cap.
No, he isn't wearing a hat — he has a cap.
No, he isn't wearing a hat - he has a cap.
No, he isn't wearing a hat (he wears a helmet).
No, he isn't wearing a hat... he has a cap.
No he isn't wearing a hat, he has a cap.
No, he isn't wearing a hat as he has a cap.
No, there is no toilet paper.
No, there is no sun.
No, there is no SUV.
No, there is no glasses on the table.
Yes, I can see a dog.
Yes, the trash can is full.
Yes, the trash can on the left is green.
Yes, that is correct.
No, there is no traffic.
Yes, the dog can be seen in the yard.
No – there is no dog in the yard.
No, it's not.
No, they're not.
No, I can't.
No, he won't.
Yes, there's a dog in the yard.
No, there's no dog.
No, there's no traffic.
Yes, there are some.
Yes, there is some.
Yes, that is a can.
No, that isn't what it does.
No, I'm not.
No, there's not.
Yes, there are some on the table.
No, there are none.
No, there are none in the yard.
"""


def lines(table: str) -> list[str]:
    return table.strip().splitlines()


@pytest.mark.parametrize("line", lines(FLIPPED))
def test_says_the_opposite(line):
    answer, opposite = line.split(" | ")
    operations = flip(answer)
    assert operations is not None
    assert apply(answer, operations)[0] == opposite


@pytest.mark.parametrize("answer", lines(LEFT_ALONE))
def test_where_a_rule_would_get_it_wrong(answer):
    assert flip(answer) is None
