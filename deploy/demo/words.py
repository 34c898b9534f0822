"""The word pools that the demo tasks fill their templates from, and how a pool is split.

Every fourth entry of a pool is held out. New entries go to a pool's end: in the middle they would
move others from one split to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

Split = Literal["train", "heldout"]
T = TypeVar("T")


def part(pool: Sequence[T], split: Split) -> Sequence[T]:
    """The entries of a pool that belong to a split."""
    return [entry for place, entry in enumerate(pool) if (place % 4 == 3) == (split == "heldout")]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    """Phrases separated by bars or line ends."""
    return tuple(text.strip().replace("\n", "|").split("|"))


NAMES = _words("""
Maria Oliver Aisha Tom Ingrid Paulo Chen Fatima Lucas Emma Ravi Sofia Hugo Amina Peter Clara Diego
Nadia Viktor Alice Kofi Elena Marcus Yuki Samuel Leila Anton Grace Mateo Hannah Omar Julia Felix
Zara Daniel Ruth Ivan Bianca Karim Lena
""")
CITIES = _words("""
Lisbon Oslo Rome Dublin Vienna Madrid Cairo Berlin Prague Athens Boston Toronto Paris Lima Sydney
Warsaw London Tokyo Chicago Milan Geneva Helsinki Mumbai Denver Munich Seattle Zurich Austin
Naples Dallas Porto Kyoto
""")
ITEMS = _words("""
lamps chairs books tables phones bottles candles jackets keyboards mirrors pillows plates shirts
cameras tents baskets clocks carpets ladders helmets guitars blankets kettles wallets brushes
sofas knives bicycles gloves printers scarves umbrellas
""")
DEPARTMENTS = _words("""
sales marketing finance support logistics research security design production training legal
quality purchasing planning payroll maintenance
""")

MORE_NAMES = _words("""
Ahmed Beatriz Carl Dina Erik Freya Gita Henrik Iris Jonas Kira Liam Mona Nils Olga Priya Quentin
Rosa Stefan Tara Uma Vera Walter Xenia Yusuf Zoe Andre Bella Cyrus Doris Edwin Flora Gabriel Helga
Ines Jamal Klaus Lydia Miguel Nora Oscar Paula Rashid Selma Theo Ursula Vincent Wendy
""")
MORE_CITIES = _words("""
Nairobi Bogota Hanoi Manila Sofia Riga Tunis Accra Havana Quito Lagos Perth Dakar Belfast Leeds
Bergen Malmo Turin Genoa Lyon Nantes Bremen Leipzig Graz Basel Ghent Utrecht Bilbao Seville Malaga
Krakow Gdansk Tallinn Vilnius Zagreb Split Tirana Izmir Haifa Amman Doha Delhi Jakarta Osaka Busan
Taipei Auckland Phoenix
""")
MORE_ITEMS = _words("""
spoons pencils hats coats belts socks boots rings drums violins flutes trumpets rugs curtains
towels sponges buckets brooms hammers nails screws ropes chains locks keys stamps envelopes
notebooks rulers erasers staplers folders monitors speakers cables batteries chargers lenses
tripods pots pans forks bowls cups jugs vases shelves benches stools desks beds blinds mats hoses
rakes shovels seeds bulbs puzzles dolls kites balls skates scooters
""")

DOCUMENTS = _phrases("""
report|budget|contract|invoice|schedule|agenda|sales figures|minutes|press release
address list|floor plan|draft|slides|price list|travel plan|photo|job offer|survey|user guide
lease|order form|logo|guest list|mail to the bank|password policy|menu|time sheet|test results
training plan|quote|road map|speech""")
TICKETS = {
    "billing": _phrases("""
I was charged twice for the {item}|the invoice for the {item} is wrong
my card was billed too much for the {item}|the receipt for the {item} shows the wrong amount
my payment for the {item} was taken twice|I see an unknown charge for {item}
"""),
    "delivery": _phrases("""
where is the parcel with my {item}|the {item} have not arrived yet|the courier lost my {item}
the package with the {item} is late|my {item} were shipped to the wrong address
when will the {item} be delivered
"""),
    "account": _phrases("""
I forgot my password and cannot order the {item}|I cannot log in to buy the {item}
please change the email of my login, I want to order {item}
the login code for my {item} order never comes|delete my account, I have my {item}
sign in fails when I look for {item}
"""),
    "returns": _phrases("""
I want to send the {item} back|how do I return the {item}|the {item} do not fit, I want a refund
I changed my mind about the {item}, take them back|I need a return label for the {item}
can I get my money back for the {item}
"""),
    "repair": _phrases("""
the {item} are broken|the {item} stopped working after a day|one of the {item} has a crack
my {item} came apart, can you fix them|the {item} are damaged and need a repair
a part of the {item} is missing
"""),
    "question": _phrases("""
do you sell {item} in blue|what do the {item} cost|which {item} are best for a child
how heavy are the {item}|do you have a discount on {item}|what are the {item} made of
"""),
}
PRESSURES = {
    "urgent": ("It is urgent.", "Please hurry!", "I need an answer today.", "It cannot wait."),
    "normal": ("No rush.", "Take your time.", "Answer when you can.", "It can wait."),
}
LABELS = tuple(f"{topic}/{pressure}" for topic in TICKETS for pressure in PRESSURES)
