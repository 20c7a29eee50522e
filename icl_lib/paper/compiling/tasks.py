"""Six few-shot tasks and three system prompts, with their questions: what the experiments compile into weights.

A few-shot prompt is eight pairs, one a line, then a question in the same form. The lists were written for this book,
from common knowledge. Some questions have another answer that is as good (*light*: *dark* or *heavy*).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from icl_lib.validation import require_size

_CAPITALS = """
Afghanistan/Kabul Albania/Tirana Algeria/Algiers Andorra/Andorra_la_Vella Angola/Luanda Argentina/Buenos_Aires
Armenia/Yerevan Australia/Canberra Austria/Vienna Azerbaijan/Baku Bahrain/Manama Bangladesh/Dhaka Barbados/Bridgetown
Belarus/Minsk Belgium/Brussels Belize/Belmopan Bhutan/Thimphu Bolivia/Sucre Botswana/Gaborone Brazil/Brasilia
Bulgaria/Sofia Cambodia/Phnom_Penh Cameroon/Yaounde Canada/Ottawa Chad/N'Djamena Chile/Santiago China/Beijing
Colombia/Bogota Costa_Rica/San_Jose Croatia/Zagreb Cuba/Havana Cyprus/Nicosia Denmark/Copenhagen Ecuador/Quito
Egypt/Cairo England/London Eritrea/Asmara Estonia/Tallinn Ethiopia/Addis_Ababa Fiji/Suva Finland/Helsinki France/Paris
Gabon/Libreville Georgia/Tbilisi Germany/Berlin Ghana/Accra Greece/Athens Guatemala/Guatemala_City Guyana/Georgetown
Haiti/Port-au-Prince Honduras/Tegucigalpa Hungary/Budapest Iceland/Reykjavik India/New_Delhi Indonesia/Jakarta
Iran/Tehran Iraq/Baghdad Ireland/Dublin Israel/Jerusalem Italy/Rome Jamaica/Kingston Japan/Tokyo Jordan/Amman
Kazakhstan/Astana Kenya/Nairobi Kuwait/Kuwait_City Kyrgyzstan/Bishkek Laos/Vientiane Latvia/Riga Lebanon/Beirut
Liberia/Monrovia Libya/Tripoli Lithuania/Vilnius Luxembourg/Luxembourg Madagascar/Antananarivo Malawi/Lilongwe
Malaysia/Kuala_Lumpur Mali/Bamako Malta/Valletta Mauritania/Nouakchott Mexico/Mexico_City Moldova/Chisinau
Mongolia/Ulaanbaatar Montenegro/Podgorica Morocco/Rabat Mozambique/Maputo Namibia/Windhoek Nepal/Kathmandu
Netherlands/Amsterdam New_Zealand/Wellington Nicaragua/Managua Niger/Niamey Nigeria/Abuja North_Korea/Pyongyang
Norway/Oslo Oman/Muscat Pakistan/Islamabad Panama/Panama_City Paraguay/Asuncion Peru/Lima Philippines/Manila
Poland/Warsaw Portugal/Lisbon Qatar/Doha Romania/Bucharest Russia/Moscow Rwanda/Kigali Saudi_Arabia/Riyadh
Scotland/Edinburgh Senegal/Dakar Serbia/Belgrade Slovakia/Bratislava Slovenia/Ljubljana Somalia/Mogadishu
South_Korea/Seoul Spain/Madrid Sudan/Khartoum Suriname/Paramaribo Sweden/Stockholm Switzerland/Bern Syria/Damascus
Taiwan/Taipei Tajikistan/Dushanbe Tanzania/Dodoma Thailand/Bangkok Tunisia/Tunis Turkey/Ankara Turkmenistan/Ashgabat
Uganda/Kampala Ukraine/Kyiv Uruguay/Montevideo Uzbekistan/Tashkent Venezuela/Caracas Vietnam/Hanoi Wales/Cardiff
Yemen/Sanaa Zambia/Lusaka Zimbabwe/Harare
"""
_OPPOSITES = """
above/below absent/present active/passive add/subtract admit/deny alive/dead always/never ancient/modern
appear/disappear approve/disapprove arrive/depart ascend/descend asleep/awake attack/defend back/front bad/good
beautiful/ugly before/after begin/end big/small bitter/sweet black/white bless/curse blunt/sharp bold/timid borrow/lend
bottom/top brave/cowardly bright/dim broad/narrow build/destroy buy/sell calm/agitated careful/careless cheap/expensive
clean/dirty clever/stupid close/open cold/hot come/go complex/simple cruel/kind day/night deep/shallow deny/admit
different/same difficult/easy divide/multiply down/up dry/wet dull/sharp early/late east/west empty/full enemy/friend
enter/exit even/odd evening/morning expand/shrink fail/succeed false/true far/near fast/slow fat/thin female/male
few/many find/lose first/last fold/unfold forget/remember forward/backward freeze/melt fresh/stale future/past gain/loss
generous/selfish gentle/rough give/take great/tiny guilty/innocent happy/sad hard/soft hate/love healthy/sick
heaven/hell heavy/light here/there hide/show high/low hope/despair import/export increase/decrease inside/outside
join/separate junior/senior king/queen large/small laugh/cry lazy/diligent leader/follower left/right legal/illegal
less/more lock/unlock long/short loose/tight loud/quiet major/minor maximum/minimum mother/father natural/artificial
new/old north/south noisy/silent off/on optimist/pessimist over/under patient/impatient peace/war permanent/temporary
polite/rude poor/rich positive/negative possible/impossible private/public proud/humble pull/push question/answer
raise/lower rare/common raw/cooked reward/punishment rise/fall safe/dangerous save/spend sink/float sit/stand
smooth/rough sour/sweet start/stop strong/weak sunrise/sunset tall/short tame/wild teacher/student thick/thin
together/apart uncle/aunt vertical/horizontal victory/defeat visible/invisible warm/cool wide/narrow win/lose
winter/summer wise/foolish yes/no young/old
"""
_FRENCH = """
air/air airport/aéroport animal/animal apple/pomme arm/bras autumn/automne bag/sac baker/boulanger bank/banque bear/ours
bed/lit beer/bière bird/oiseau black/noir blood/sang blue/bleu boat/bateau book/livre bottle/bouteille boy/garçon
bread/pain bridge/pont brother/frère butter/beurre cake/gâteau car/voiture cat/chat chair/chaise cheese/fromage
cherry/cerise chicken/poulet child/enfant church/église city/ville cloud/nuage coffee/café cold/froid country/pays
cousin/cousin cow/vache cup/tasse daughter/fille day/jour death/mort doctor/médecin dog/chien door/porte dress/robe
drink/boire duck/canard ear/oreille earth/terre east/est eat/manger egg/oeuf eight/huit elephant/éléphant eye/oeil
face/visage factory/usine family/famille farm/ferme father/père fever/fièvre finger/doigt fire/feu fish/poisson
five/cinq flag/drapeau flower/fleur foot/pied forest/forêt four/quatre friend/ami fruit/fruit garden/jardin girl/fille
glass/verre glove/gant gold/or grass/herbe green/vert hair/cheveux hand/main hat/chapeau head/tête heart/coeur
honey/miel horse/cheval hospital/hôpital hour/heure house/maison hunger/faim ice/glace island/île key/clé king/roi
kitchen/cuisine knife/couteau lake/lac lamp/lampe language/langue leaf/feuille leg/jambe lemon/citron letter/lettre
life/vie light/lumière lion/lion love/amour man/homme meat/viande milk/lait money/argent month/mois moon/lune
morning/matin mother/mère mountain/montagne mouse/souris mouth/bouche music/musique name/nom neck/cou night/nuit
nine/neuf north/nord nose/nez one/un paper/papier peace/paix pen/stylo pepper/poivre pig/cochon plate/assiette
queen/reine rabbit/lapin rain/pluie red/rouge rice/riz river/rivière road/route roof/toit room/chambre salt/sel
sand/sable school/école sea/mer seven/sept sheep/mouton shirt/chemise shoe/chaussure silver/argent sister/soeur six/six
skin/peau sky/ciel snow/neige son/fils south/sud spoon/cuillère spring/printemps star/étoile stone/pierre street/rue
strong/fort sugar/sucre summer/été sun/soleil table/table tea/thé teacher/professeur ten/dix three/trois time/temps
tooth/dent tower/tour train/train tree/arbre two/deux uncle/oncle village/village voice/voix wall/mur war/guerre
water/eau week/semaine west/ouest wheel/roue white/blanc wind/vent window/fenêtre wine/vin winter/hiver wolf/loup
woman/femme wood/bois word/mot world/monde year/an yellow/jaune
"""
_PAST = """
accept/accepted agree/agreed answer/answered arrive/arrived ask/asked bake/baked beg/begged begin/began believe/believed
bend/bent bite/bit blow/blew borrow/borrowed break/broke bring/brought build/built buy/bought call/called carry/carried
catch/caught change/changed choose/chose clean/cleaned climb/climbed close/closed come/came cook/cooked count/counted
cry/cried dance/danced decide/decided dig/dug do/did draw/drew dream/dreamed drink/drank drive/drove drop/dropped
eat/ate enjoy/enjoyed enter/entered explain/explained fall/fell feed/fed feel/felt fight/fought find/found
finish/finished fly/flew follow/followed forget/forgot forgive/forgave freeze/froze get/got give/gave go/went grow/grew
hang/hung have/had hear/heard help/helped hide/hid hold/held hope/hoped hurry/hurried invite/invited join/joined
jump/jumped keep/kept kneel/knelt know/knew laugh/laughed lead/led learn/learned leave/left lend/lent lie/lay like/liked
listen/listened live/lived look/looked lose/lost love/loved make/made marry/married meet/met move/moved need/needed
notice/noticed open/opened order/ordered paint/painted pay/paid plan/planned plant/planted play/played prefer/preferred
pull/pulled push/pushed rain/rained reach/reached receive/received remember/remembered repair/repaired rest/rested
return/returned ride/rode ring/rang rise/rose run/ran say/said see/saw seek/sought sell/sold send/sent shake/shook
shine/shone shoot/shot show/showed sing/sang sink/sank sit/sat sleep/slept smell/smelled smile/smiled speak/spoke
spend/spent stand/stood start/started stay/stayed steal/stole stick/stuck stop/stopped study/studied swear/swore
sweep/swept swim/swam swing/swung take/took talk/talked teach/taught tear/tore tell/told think/thought throw/threw
touch/touched travel/travelled try/tried turn/turned understand/understood use/used visit/visited wait/waited wake/woke
walk/walked want/wanted wash/washed watch/watched wear/wore weep/wept win/won wish/wished work/worked write/wrote
"""
_PLURALS = """
address/addresses animal/animals answer/answers apple/apples army/armies arrow/arrows artist/artists aunt/aunts
baby/babies bag/bags ball/balls basket/baskets beach/beaches bell/bells berry/berries bird/birds boat/boats body/bodies
book/books bottle/bottles box/boxes boy/boys branch/branches bridge/bridges brother/brothers brush/brushes bus/buses
button/buttons candle/candles castle/castles cat/cats cherry/cherries child/children church/churches circle/circles
city/cities class/classes cloud/clouds coat/coats coin/coins copy/copies country/countries cousin/cousins cup/cups
daughter/daughters day/days desk/desks diary/diaries dish/dishes doctor/doctors dog/dogs donkey/donkeys door/doors
dream/dreams dress/dresses echo/echoes egg/eggs engine/engines eye/eyes factory/factories family/families farmer/farmers
fence/fences finger/fingers flag/flags flower/flowers fly/flies foot/feet forest/forests fork/forks fox/foxes
friend/friends game/games garden/gardens gift/gifts girl/girls glass/glasses goose/geese half/halves hand/hands hat/hats
hero/heroes hill/hills horse/horses hour/hours house/houses idea/ideas island/islands judge/judges key/keys king/kings
kiss/kisses kitchen/kitchens knife/knives lady/ladies lake/lakes lamp/lamps language/languages leaf/leaves
lesson/lessons letter/letters life/lives lion/lions loaf/loaves machine/machines man/men map/maps market/markets
match/matches mirror/mirrors monkey/monkeys mountain/mountains mouse/mice museum/museums nail/nails name/names
needle/needles nurse/nurses ocean/oceans office/offices ox/oxen page/pages party/parties pencil/pencils person/people
photo/photos piano/pianos picture/pictures pilot/pilots planet/planets poem/poems potato/potatoes price/prices
prince/princes queen/queens question/questions rabbit/rabbits ring/rings river/rivers road/roads rope/ropes rose/roses
ruler/rulers school/schools shelf/shelves ship/ships shoe/shoes shop/shops sister/sisters soldier/soldiers song/songs
spoon/spoons star/stars stone/stones story/stories street/streets student/students table/tables tax/taxes
teacher/teachers thief/thieves tiger/tigers tomato/tomatoes tooth/teeth tower/towers town/towns toy/toys tree/trees
uncle/uncles valley/valleys village/villages voice/voices wall/walls watch/watches wave/waves week/weeks wheel/wheels
wife/wives window/windows wish/wishes wolf/wolves woman/women word/words year/years
"""
_REVIEWED = """
album book café camera concert film game garden hotel lecture lunch museum phone play shop song tour train
"""
_PRAISE = """
amazing beautiful brilliant charming delightful excellent fantastic lovely perfect splendid superb wonderful
"""
_BLAME = "awful bad boring disappointing disgusting dreadful dull horrible nasty poor terrible ugly"
_REVIEWS = (
    "The {thing} was {word}.",
    "This {thing} is {word}!",
    "We thought the {thing} was {word}.",
    "I found the {thing} {word}.",
)


def _listed(text: str) -> tuple[tuple[str, str], ...]:
    """The pairs of a list: `/` between question and answer, `_` for a space inside them."""
    return tuple(tuple(part.replace("_", " ") for part in pair.split("/")) for pair in text.split())


def _reviews() -> tuple[tuple[str, str], ...]:
    """All sentences, the two labels in turn."""
    forms = [(form, thing) for form in _REVIEWS for thing in _REVIEWED.split()]
    both = []
    for number, (form, thing) in enumerate(forms * 2):
        for words, label in ((_PRAISE.split(), "positive"), (_BLAME.split(), "negative")):
            both.append((form.format(thing=thing, word=words[(5 * number + number // len(forms)) % 12]), label))
    return tuple(both)


@dataclass(frozen=True)
class FewShotTask:
    """Pairs of a question and its answer, and how a pair is written.

    Attributes:
        name: of the task.
        pairs: questions with their answers.
        question: the form of a question, with ``{}`` in its place; a space and the answer follow, then a new line.

    >>> TASKS["capitals"].asked("Italy"), TASKS["capitals"].answered("Italy", "Rome")
    ('Italy ->', 'Italy -> Rome\\n')
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    question: str = "{} ->"

    def asked(self, question: str) -> str:
        """A question as the model reads it."""
        return self.question.format(question)

    def answered(self, question: str, answer: str) -> str:
        """A line of the prompt."""
        return f"{self.asked(question)} {answer}\n"

    def split(self, seed: int, examples: int = 8, calibration: int = 64, held_out: int = 40) -> FewShotSplit:
        """Draw a prompt, the questions to calibrate on, and others to ask: no question is in two of these.

        >>> split = TASKS["opposites"].split(seed=0, examples=2)
        >>> print(split.prompt + split.calibration[0], len(split.calibration), len(split.held_out))
        lazy -> diligent
        major -> minor
        arrive -> 64 40
        """
        for name, size in (("examples", examples), ("calibration", calibration), ("held_out", held_out)):
            require_size(name, size)
        if examples + calibration + held_out > len(self.pairs):
            raise ValueError(
                f"held_out is {held_out}, with {examples} examples and {calibration} questions to calibrate on, but "
                f"{self.name} has {len(self.pairs)} pairs: ask for fewer."
            )
        pairs = random.Random(seed).sample(self.pairs, len(self.pairs))
        calibrated = pairs[examples : examples + calibration]
        held = pairs[examples + calibration :][:held_out]
        return FewShotSplit(
            "".join(self.answered(*pair) for pair in pairs[:examples]),
            tuple(self.asked(question) for question, _ in calibrated),
            tuple(self.asked(question) for question, _ in held),
            tuple(f" {answer}" for _, answer in held),
        )


@dataclass(frozen=True)
class FewShotSplit:
    """A prompt with its questions, all as text.

    Attributes:
        prompt: the examples, one a line.
        calibration: questions to calibrate on.
        held_out: other questions.
        answers: the right answers of ``held_out``, with the space before them.
    """

    prompt: str
    calibration: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]


TASKS: dict[str, FewShotTask] = {
    task.name: task
    for task in (
        FewShotTask("capitals", _listed(_CAPITALS)),
        FewShotTask("opposites", _listed(_OPPOSITES)),
        FewShotTask("French", _listed(_FRENCH)),
        FewShotTask("past tense", _listed(_PAST)),
        FewShotTask("plurals", _listed(_PLURALS)),
        FewShotTask("sentiment", _reviews(), "Review: {} Label:"),
    )
}
"""The six tasks by name; each has more than 116 pairs."""

SYSTEM_PROMPTS: dict[str, str] = {
    "pirate": "You are a pirate. You answer every question in the words of a pirate, and you are proud of your ship.",
    "in French": "You are a teacher of French. You answer every question in French, in one or two short sentences.",
    "as JSON": 'You are a program. You answer every question with JSON, as {"answer": "..."}, without other words.',
}
"""The system prompts by name."""

_MESSAGES = """
What is the largest ocean?/How do I boil an egg?/Why is the sky blue?/Who wrote Hamlet?/What is a verb?
How many legs has a spider?/Tell me about the moon./What should I eat tonight?/How far away is the sun?/What is a poem?
What is seven times eight?/Name three colours./Where do penguins live?/How do birds fly?/What is a good name for a cat?
Why do leaves fall?/What does a doctor do?/What is gold used for?/Is a whale a fish?/Which month has the fewest days?
How can I sleep better?/What is the capital of Peru?/Why do we dream?/Who painted the Mona Lisa?
What is a volcano?/How old is the Earth?/Give me a word for happy./What do cows eat?/How do I tie a knot?/What is music?
Why is the sea salty?/What is a triangle?/Who was Napoleon?/How do I clean a window?/What makes bread rise?
Where does rain come from?/What is the fastest animal?/How do I learn to swim?/Which planet is the hottest?
How do plants drink?/How does a bicycle work?/What is a library for?/Why do cats purr?/Tell me a short story.
What is a magnet?/Who invented the telephone?/What is ten minus four?/How do bees make honey?/What is a desert?
How do I plant a tree?/Why do we laugh?/How do I write a letter?/What is the opposite of hot?
Where is the Eiffel Tower?/How long is a year?
What is glass made of?/How do I greet a king?/Why is grass green?/Name a large city./How do I make tea?
"""
MESSAGES: tuple[str, ...] = tuple(_MESSAGES.strip().replace("\n", "/").split("/"))
"""Sixty messages to a model with a system prompt."""

UNRELATED: tuple[str, ...] = (
    "The harbour was quiet when the first boats came in. Men in heavy coats carried crates of fish up the stone "
    "steps, and the gulls circled above them. By noon the market was full, and the price of herring had fallen by"
    " half.",
    "To change a tyre, first park the car on level ground and apply the handbrake. Loosen the wheel nuts before "
    "you lift the car with the jack. When the wheel is off the ground, remove the nuts and pull the wheel towards"
    " you.",
    "def mean(values):\n"
    "    total = 0\n"
    "    for value in values:\n"
    "        total += value\n"
    "    return total / len(values)\n",
    "Dear Mr. Harris, thank you for your letter of the third of March. We are sorry to hear that the lamp arrived"
    " broken. A new one will be sent to you this week, and you do not need to return the old one.",
    "She opened the door and looked into the room. Nobody was there. The lamp still burned on the table, and "
    "beside it lay a half-written letter. He must have left in a hurry, she thought, and picked up the page.",
)
"""Texts that have nothing to do with the tasks, written for this book: what edits do to them is harm."""

GUARDS: tuple[str, ...] = (
    "The committee met on Tuesday to discuss the plans for the new bridge. Several members asked about the cost, and "
    "the engineer explained that steel had become more expensive since the spring.",
    "Water boils at a lower temperature on a mountain because the air pressure is lower there. For this reason, "
    "vegetables need more time to cook at high altitude.",
    "import os\n\n"
    "for name in sorted(os.listdir('.')):\n"
    "    if name.endswith('.txt'):\n"
    "        with open(name) as file:\n"
    "            print(name, len(file.read()))\n",
    "Question: How many days are in a leap year?\n"
    "Answer: There are 366 days in a leap year, one more than in other years.\n\n"
    "Question: Who discovered penicillin?\n"
    "Answer: Alexander Fleming.",
    "Dear Anna, I hope you are well. We arrived in Lisbon last night after a long journey. The hotel is small but "
    "clean, and from the window we can see the river. Tomorrow we will visit the castle. Love, Tom",
    "The old man lived by himself in a house at the edge of the forest. Every morning he walked to the well, and "
    "every evening he lit a fire and read until he fell asleep.",
    "In 1815 the eruption of Mount Tambora threw so much ash into the air that the following year had no summer in "
    "much of Europe and North America.",
    "- 2 cups of flour\n- 1 teaspoon of baking powder\n- a pinch of salt\n- 3 eggs\n\n"
    "Mix the dry ingredients first, then add the eggs one by one.",
)
"""Other texts that have nothing to do with the tasks: what a guard is made of."""
