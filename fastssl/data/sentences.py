"""A small grammar that generates English sentences for the demo corpus, written for this package."""

import random
import re

_SHORT = (
    "Good morning. Thank you very much. Not today. Come in! Who is there? Never mind. That is enough. Look at this! "
    "Yes, of course. I doubt it. Let us go. Wait a moment. Where is it? Nobody knows. What a pity! See you soon. "
    "How far is it? Try again. We agree. She left. Open the door! It rains."
)
_WORDS = {
    "name": "Anna, Bruno, Clara, David, Edith, Felix, Grace, Hugo, Irene, Jacob, Laura, Martin, Nora, Oscar, Paula, "
    "Ruth, Simon, Vera",
    "person": "baker, captain, doctor, farmer, gardener, judge, neighbour, nurse, painter, pilot, sailor, singer, "
    "student, teacher, uncle, stranger, watchmaker, young woman, old man, tall boy, little girl",
    "thing": "apple, basket, blanket, bottle, box, candle, chair, clock, coat, cup, drum, envelope, feather, flute, "
    "hammer, jacket, kettle, key, lamp, ladder, letter, map, mirror, needle, newspaper, package, pencil, photograph, "
    "piano, picture, pillow, ribbon, rope, saddle, spoon, suitcase, table, telescope, ticket, umbrella, vase, violin",
    "things": "apples, boats, books, bottles, boxes, cages, candles, coins, eggs, flowers, gloves, horses, jars, keys, "
    "letters, maps, oranges, pages, potatoes, roses, shoes, spoons, stamps, stones, tickets, towels, wheels",
    "adjective": "ancient, blue, broken, bright, cheap, clean, cold, curious, dark, dusty, empty, enormous, famous, "
    "fresh, green, heavy, hollow, huge, lovely, muddy, narrow, new, pale, quiet, red, rough, round, sharp, shiny, "
    "silver, small, smooth, soft, square, strange, thin, warm, white, wide, wooden, yellow",
    "carried": "bought, borrowed, broke, carried, caught, cleaned, dropped, exchanged, examined, fetched, finished, "
    "forgot, found, hid, kept, lost, measured, mended, moved, noticed, ordered, painted, polished, pushed, repaired, "
    "saved, sold, stole, threw away, touched, unpacked, used, washed, watched, wrapped, gave back",
    "carry": "borrow, break, buy, carry, catch, clean, drop, fetch, find, fix, hide, keep, measure, mend, move, "
    "notice, paint, push, repair, sell, show, touch, use, wash, wrap, give back",
    "walked": "arrived, cycled, danced, hurried, laughed, marched, paused, rested, sailed, sang, sat, slept, stood, "
    "travelled, waited, walked, wandered, whispered, worked",
    "place": "airport, beach, bakery, bridge, castle, church, corner, courtyard, factory, field, forest, garden, "
    "harbour, hospital, hotel, island, kitchen, lake, library, market, meadow, mill, mountain, museum, office, park, "
    "river, road, school, shop, station, theatre, tower, valley, village, yard",
    "near": "above, across, behind, below, beside, beyond, in front of, inside, near, opposite, outside, past, through",
    "time": "this morning, last winter, on Monday, on Thursday, every evening, at noon, after lunch, before sunrise, "
    "in July, long ago, twice a year, the next day, once again, at five o'clock, during the storm, all week",
    "how": "badly, carefully, early, easily, gently, gladly, often, proudly, quickly, quietly, rarely, slowly, "
    "suddenly, very late, without a word",
    "number": "two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fifteen, sixteen, "
    "twenty, thirty, forty, a hundred, a thousand",
    "weather": "cloudy, cold, dark, foggy, hot, mild, rainy, stormy, sunny, warm, windy",
}
_PATTERNS = (
    "the {adjective} {thing} belongs to the {person}.",
    "{name} {carried} the {adjective} {thing} {near} the {place}.",
    "the {person} {carried} {number} {adjective} {things} {time}.",
    "{time}, {name} {walked} {how} {near} the {place}.",
    "why did {name} {carry} the {thing}?",
    "did you {carry} the {adjective} {things}, or did the {person} {carry} them?",
    "it was {weather}, and the {person} {walked} {near} the {adjective} {place}.",
    "{name} and {name} {walked} between the {place} and the {place}.",
    "there were {number} {things} {near} the {thing}, but nobody {carried} them.",
    "if it is {weather} tomorrow, we will {carry} the {thing} and the {things}.",
    "please {carry} the {adjective} {thing} {how}.",
    "the {place} is {adjective}, and the {place} {near} it is {adjective}.",
    "when the {person} {walked} {near} the {place}, {name} {carried} the {thing}.",
    "she {carried} it {how}, {near} the {place}.",
    "he has never seen such {adjective} {things}.",
    "{number} {things} cost {number} pounds at the {place}.",
    "my {person} said that {name} should {carry} the {thing} {time}.",
    "{short}",
)
_CHOICES = {kind: words.split(", ") for kind, words in _WORDS.items()} | {"short": re.findall(r"[^.?!]+[.?!]", _SHORT)}


def sentence(draw: random.Random) -> str:
    """Generate a random sentence of two to about fifteen words, with an initial capital and final punctuation.

    Args:
        draw: Source of randomness; the same state gives the same sentence.
    """
    pattern = draw.choice(_PATTERNS)
    text = re.sub(r"{(\w+)}", lambda slot: draw.choice(_CHOICES[slot[1]]).strip(), pattern)
    return text[0].upper() + text[1:]
