"""Word problems: 20 training and 10 held-out templates for each operation, and the words that fill them.

Fields: {a} and {b} are the operands in the order of the equation "a op b"; {name} and {other} are two different
people; {items} is a plural; {box} / {boxes} are one container in both numbers; {place} follows a preposition.
"""

from typing import Final, NamedTuple


class Templates(NamedTuple):
    """Training templates, and templates that only validation uses."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


NAMES: Final = (
    "Ada", "Amir", "Bea", "Carlos", "Chen", "Dana", "Elif", "Emma", "Femi", "Grace", "Hana", "Igor",
    "Jack", "Kofi", "Lena", "Mina", "Noor", "Oscar", "Priya", "Quinn", "Rosa", "Samir", "Tara", "Yuki",
)  # fmt: skip
ITEMS: Final = (
    "apples", "balls", "beads", "books", "buttons", "cards", "coins", "cookies", "eggs", "flowers", "keys", "lemons",
    "marbles", "oranges", "pears", "pencils", "plums", "ribbons", "rings", "shells", "stamps", "stickers", "stones",
    "tickets",
)  # fmt: skip
CONTAINERS: Final = (
    ("bag", "bags"), ("basket", "baskets"), ("bowl", "bowls"), ("box", "boxes"), ("bucket", "buckets"),
    ("case", "cases"), ("crate", "crates"), ("jar", "jars"), ("tin", "tins"), ("tray", "trays"),
)  # fmt: skip
PLACES: Final = (
    "bakery", "beach", "camp", "fair", "farm", "garden", "kitchen", "library",
    "market", "museum", "office", "park", "school", "shop", "station", "zoo",
)  # fmt: skip

ADDITION: Final = Templates(
    train=(
        "{name} has {a} {items} and {other} has {b} {items}. How many {items} do they have altogether?",
        "{name} picks {a} {items} at the {place} and then {b} more. How many {items} is that?",
        "A {box} holds {a} {items}. {name} adds {b} {items}. How many {items} are in the {box} now?",
        "There are {a} {items} at the {place}. {b} more arrive. How many {items} are there now?",
        "{name} bought {a} {items} on Monday and {b} {items} on Tuesday. How many did {name} buy in total?",
        "{other} gives {b} {items} to {name}, who already had {a}. How many {items} does {name} have now?",
        "One {box} has {a} {items} and another has {b}. How many {items} are in both?",
        "{name} counted {a} {items} in the morning and {b} in the evening. What is the total?",
        "At the {place}, {name} sold {a} {items} and {other} sold {b}. How many were sold?",
        "{name} had {a} {items} and found {b} more at the {place}. How many does {name} have?",
        "{name} made {a} {items}. {other} made {b}. How many {items} did they make together?",
        "The {place} ordered {a} {items} and later {b} more. How many {items} were ordered?",
        "{a} {items} are on the table and {b} are on the floor. How many {items} are there?",
        "{name} saved {a} {items} last year and {b} this year. How many {items} are saved?",
        "{name} puts {a} {items} and then {b} {items} into a {box}. How many are inside?",
        "After winning {b} {items}, {name} adds them to {a} others. How many {items} now?",
        "{name} carried {a} {items} to the {place}. {other} carried {b}. How many were carried?",
        "A shelf has {a} {items}. {name} places {b} beside them. How many {items} are on the shelf?",
        "{name} packed {a} {items} and {other} packed {b}. How many {items} are packed?",
        "The {place} had {a} {items} and got {b} as a gift. How many {items} does it have?",
    ),
    held_out=(
        "{name} owns {a} {items}. {other} brings {b} more. How many {items} is that altogether?",
        "There were {a} {items} in the {box} and {name} put in {b}. How many are there now?",
        "{name} found {a} {items} at the {place} and {other} found {b}. What is the total?",
        "On Monday {name} sold {a} {items} and on Tuesday {b}. How many {items} were sold?",
        "{name} has {a} {items} and wins {b} at the {place}. How many {items} does {name} have?",
        "The {box} has {a} {items} and the table has {b}. How many {items} in total?",
        "{other} made {a} {items} and {name} made {b} more. How many were made together?",
        "{name} counted {a} {items} and {other} counted {b}. How many did they count?",
        "{a} {items} were ordered and {b} arrive later. How many {items} are at the {place}?",
        "{name} had {a} {items} and {other} gives {name} {b}. How many {items} now?",
    ),
)

SUBTRACTION: Final = Templates(
    train=(
        "{name} has {a} {items} and gives {b} to {other}. How many {items} are left?",
        "There were {a} {items} in a {box}. {name} took {b}. How many {items} remain?",
        "{name} had {a} {items} and lost {b} at the {place}. How many does {name} still have?",
        "The {place} had {a} {items} and sold {b}. How many {items} remain?",
        "{name} baked {a} {items} and {other} ate {b}. How many are left?",
        "Of {a} {items}, {b} are broken. How many {items} are not broken?",
        "{name} has {a} {items} and {other} has {b}. How many more does {name} have?",
        "A {box} of {a} {items} fell and {b} rolled away. How many stayed?",
        "{name} needs {a} {items} and has {b}. How many more {items} are needed?",
        "{a} {items} were at the {place}. {b} were taken home. How many are still there?",
        "{name} saved {a} {items} and spent {b}. How many {items} remain?",
        "From {a} {items}, {name} removes {b}. How many are left over?",
        "{name} started with {a} {items} and used {b}. How many {items} are unused?",
        "{a} {items} are on the table. {other} takes {b}. How many stay on the table?",
        "{name} sent {b} of {a} {items} to {other}. How many {items} did {name} keep?",
        "The {box} holds {a} {items}. After {name} eats {b}, how many are left?",
        "{name} picked {a} {items} but dropped {b}. How many {items} are still picked?",
        "{a} {items} were planned for the {place} but {b} never came. How many came?",
        "{name} wanted to sell {a} {items} and sold {b}. How many are unsold?",
        "A shelf had {a} {items}. {name} moved {b} away. How many are on the shelf?",
    ),
    held_out=(
        "{name} had {a} {items} and {other} took {b}. How many {items} are left?",
        "There are {a} {items} at the {place} and {b} are sold. How many remain?",
        "{name} lost {b} of {a} {items}. How many does {name} still have?",
        "A {box} had {a} {items} and {name} removes {b}. How many stay?",
        "{name} baked {a} {items} and gives away {b}. How many {items} are left over?",
        "{other} has {b} {items} and {name} has {a}. How many more does {name} have?",
        "{a} {items} were on the shelf. {b} fell. How many are still there?",
        "{name} spent {b} of {a} {items} at the {place}. How many {items} remain?",
        "{name} started with {a} {items} and ate {b}. How many are left?",
        "{name} needs {a} {items} but only {b} came. How many more are needed?",
    ),
)

MULTIPLICATION: Final = Templates(
    train=(
        "There are {a} {boxes} with {b} {items} each. How many {items} are there in all?",
        "{name} fills {a} {boxes} with {b} {items} in each. How many {items} does {name} use?",
        "Each of {a} children holds {b} {items}. How many {items} do the children hold?",
        "{name} plants {a} rows of {b} {items}. How many {items} are planted?",
        "One {box} costs {b} coins. What do {a} {boxes} cost?",
        "{name} makes {b} {items} every day for {a} days. How many {items} are made?",
        "The {place} has {a} tables with {b} {items} on every table. How many {items} is that?",
        "{name} reads {b} pages every hour for {a} hours. How many pages does {name} read?",
        "{a} friends each bring {b} {items} to the {place}. How many {items} are brought?",
        "{name} walks {b} miles a day. How many miles does {name} walk in {a} days?",
        "A wall has {a} rows of {b} stones. How many stones are in the wall?",
        "{a} carts carry {b} {items} each to the {place}. How many {items} are carried?",
        "{name} buys {a} packs of {b} {items}. How many {items} does {name} buy?",
        "Every {box} has {b} {items}. How many {items} do {a} such {boxes} have?",
        "{name} sells {b} {items} to each of {a} people. How many {items} are sold?",
        "The {place} opens {a} doors and {b} people pass through each. How many people pass?",
        "{name} ties {b} ribbons on each of {a} {boxes}. How many ribbons is that?",
        "{a} teams of {b} players meet at the {place}. How many players meet?",
        "{name} reads {a} books with {b} stories each. How many stories does {name} read?",
        "{name} draws {a} circles with {b} dots in each. How many dots are drawn?",
    ),
    held_out=(
        "{name} has {a} {boxes} of {b} {items} each. How many {items} is that in all?",
        "{name} buys {a} {boxes} with {b} {items} in each. How many {items} does {name} have?",
        "Each of {a} friends makes {b} {items}. How many {items} are made?",
        "The {place} has {a} rows of {b} {items}. How many {items} are there?",
        "{name} sells {b} {items} every day for {a} days. How many {items} are sold?",
        "{a} tables at the {place} hold {b} {items} each. How many {items} is that?",
        "Every one of {a} children brings {b} {items}. How many {items} are brought?",
        "{name} carries {a} packs of {b} {items}. How many {items} does {name} carry?",
        "One pack costs {b} coins. What do {a} packs cost?",
        "{name} walks {b} miles every hour for {a} hours. How many miles is that?",
    ),
)

DIVISION: Final = Templates(
    train=(
        "{name} shares {a} {items} equally among {b} friends. How many {items} does each friend get?",
        "{a} {items} are packed into {b} {boxes} equally. How many {items} go in each {box}?",
        "There are {a} {items} for {b} children. How many {items} does every child get?",
        "{name} has {a} {items} and puts {b} in each {box}. How many {boxes} are filled?",
        "If {b} {items} fit in a {box}, how many {boxes} do {a} {items} need?",
        "{a} {items} are split evenly between {b} tables. How many are on each table?",
        "{name} reads {a} pages in {b} days, the same every day. How many pages a day?",
        "{b} equal {boxes} cost {a} coins. What does one {box} cost?",
        "The {place} divides {a} {items} into {b} equal groups. How large is a group?",
        "{name} cuts a rope of {a} feet into {b} equal parts. How long is each part?",
        "{a} players form {b} equal teams at the {place}. How many players are on a team?",
        "{name} deals {a} cards equally to {b} people. How many cards does one person get?",
        "A farmer sets {a} {items} in {b} equal rows. How many {items} are in a row?",
        "{name} uses {b} {items} a day. How many days do {a} {items} last?",
        "{a} {items} weigh the same in {b} {boxes}. How many are in one {box}?",
        "{name} and friends, {b} people in all, split {a} {items}. How many does each take?",
        "{a} seats stand in {b} equal rows at the {place}. How many seats are in a row?",
        "{name} pays {a} coins for {b} {items}. How many coins is one?",
        "Each guest takes {b} {items}. How many guests can {a} {items} serve?",
        "{name} loads {a} {items} evenly on {b} carts. How many {items} does a cart carry?",
    ),
    held_out=(
        "{name} splits {a} {items} equally among {b} children. How many {items} does each get?",
        "{a} {items} go evenly in {b} {boxes}. How many {items} are in one {box}?",
        "{name} packs {b} {items} in each {box}. How many {boxes} do {a} {items} need?",
        "The {place} shares {a} {items} among {b} people. How many does every person get?",
        "{a} {items} are divided into {b} equal rows. How many are in a row?",
        "{b} friends split {a} coins equally. How many coins does each friend take?",
        "{name} puts {a} {items} on {b} tables evenly. How many are on one table?",
        "{b} {items} cost {a} coins. What does one cost?",
        "{name} reads {a} pages in {b} equal parts. How long is a part?",
        "{a} children form {b} equal groups at the {place}. How large is each group?",
    ),
)
