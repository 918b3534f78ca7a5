"""Make a synthetic set of bank expenses with the columns and the character of the real one.

Nothing in it is taken from real data: names and numbers are made up from the seed, and no company
in it is meant to be a real one. The constants aim at the figures published for the real set, whose
words are hashes; `--describe` prints those of any such set. Where that set has ranges of amounts,
this one has sums, and a column more: a `Department`, for what a key beside the text is worth.

Companies meet merchants and book each by habit, to an account of their own chart. What is hard to
predict is hard for an accountant's reasons: a merchant never met before, an account just opened, an
entry split over two accounts, a habit that leaves room for doubt. Sums and departments help with
some of that, and with some they don't.
"""

import argparse
import csv
import io
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import date, timedelta
from itertools import accumulate, chain, cycle, islice, product
from math import exp
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("bank_expenses_synthetic.csv.zip")
COLUMNS = ["", "CompanyId", "BankEntryDate", "BankEntryText", "BankEntryAmount"]
COLUMNS += ["AccountName", "AccountNumber", "AccountTypeName"]  # the real set's
ALL_COLUMNS = [*COLUMNS, "Department"]
DAYS = [date(2014, 1, 2) + timedelta(n) for n in range(994)]  # to 2016-09-21
WORKDAYS = [day.isoformat() for day in DAYS if day.weekday() < 5]

# Companies: of 99, a tenth has fewer than 90 rows, a tenth more than 1,500, and one has 7,000
ROWS_PER_COMPANY = 500  # for the default number of companies
SIZE_SPREAD = 1.15  # sd of log(rows)
OPENINGS = [0, 0, 0, 0, 0, 260, 260, 521, *range(50, 700, 90)]  # often with the year: workdays

# How often something new turns up: discount and strength of a Pitman-Yor process
MERCHANTS = 0.7, 3.0
ACCOUNTS = 0.55, 0.9  # 35 accounts in 400 rows, 70 in 1,500; new to the company in 6 % of rows

# Accounts: over 70 % in one company only, and yet the top ten hold 39 % of rows
FIRST_DIGITS = "1526347128"  # most used first; 1 is revenue, 2 to 4 cost, 5 and up balance: 43 %
PLACES = range(600)  # in the standard chart of accounts, most used first
CORE_PLACES = 12  # numbered alike by all companies but those with
HOUSE_CHART = 0.12  # numbers of their own for all accounts, of 4 to 7 digits
OWN_ACCOUNT = 0.26  # other places that a company numbers itself

# Texts: 74 % of words occur once, 10 % in several companies; 21 % of occurrences are numeric
COMMON_WORDS = 9000
TOPIC_WORDS = 12  # words that go with one account, in all companies: the chart's, and names
LENGTHS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 15], [11, 19, 20, 31, 9, 4, 2, 1.5, 1, 0.5, 0.3, 0.2]
FIRST_SLOTS = ["word", "code", "topic", "common"], [33, 17, 20, 30]
SLOTS = ["word", "code", "topic", "common", "<term>", "<name>", "<number>"]
SLOTS = SLOTS, [20, 10, 12, 16, 19, 12, 11]  # each entry fills those in <> anew
# From the second slot on they are in this order, so that they read like a bank statement
ORDER = ["common", "topic", "word", "<name>", "trade", "<term>", "code", "<number>"]
MONTH_IS_NAMED = 0.2  # terms that are the entry's month
DATED = 0.1  # numbers that are the entry's date

# Habits, and what they leave open: the same text and amount on two accounts, 7 % duplicates
SHARED_MERCHANTS = 3000
MERCHANT_IS_SHARED = 0.4  # when a company meets a new one
BOOKED_AS_USUAL = 0.75  # shared merchants that go where they go in other companies
DOUBTFUL = 0.2  # merchants with a second account, which gets up to half of their entries
REPEATED = 0.035  # rows that repeat the one before
SPLIT = 0.045  # rows that book the entry before to another account
PAYS_IN = {"1": 0.95, "2": 0.05, "3": 0.05, "4": 0.05}  # merchants, by first digit; others: half
PAID_IN, PAID_OUT = (3.26, 0.79), (2.82, 0.95)  # mean and sd of log10(amount): 57 % are negative
MERCHANT_SPREAD = 0.4  # the part of that sd which is within one merchant

# Sums: rents, subscriptions and fees recur to the cent; most others are never seen again
RECURS, RECURS_ELSEWHERE = 0.8, 0.06  # merchants with a usual sum: of RECURRING accounts, others
FROM_TARIFF = 0.5  # usual sums that another merchant of the same account has, too
USUAL = 0.92  # entries that are of the usual sum, where there is one
CENTS = ["any", "none", "price"], [60, 25, 15]  # accounts, by what their other sums end in

# Departments: each account has its own in a company, and each merchant of it that or another
STAFFED = [0, 3, 4, 5, 6, 7, 8, 10]  # departments that a company has
AT_HOME = 0.85  # merchants that the account's department deals with
UNSAID, MISTAKEN = 0.1, 0.06  # entries with no department, and of the others with just any

split = str.split  # lists of words are easier to read as text

# Accounts by first digit, and what texts say of them, both most used first; words with a capital
# are trades, which follow names
CHART = """
1 Sales, domestic: sales Stores customer invoice order takings
1 Services: consulting Advisers hours project assignment advice
1 Sales, export: export Trading overseas shipment customer abroad
1 Card takings: terminal Diner takings till batch shop
1 Online shop: webshop Marketplace basket orders checkout parcel
1 Maintenance contracts: maintenance Facilities contract inspection yearly
1 Subscriptions sold: subscription Club member plan renewal
1 Rental income: tenant Lettings hire lodging deposit flat
1 Repairs sold: repair Fitters workshop spare parts job
1 Commission: commission Agents agency referral broker share
2 Goods for resale: goods Traders wholesale stock supplier crates
2 Wages: wages Staffing payroll overtime shift temp
2 Raw materials: materials Mill timber steel sheet fabric
2 Freight: freight Haulage courier pallet delivery parcel
2 Subcontractors: subcontractor Builders labour site scaffolding plaster
2 Salaries: salary People bonus payroll allowance staff
2 Packaging: packaging Cartons boxes labels foil wrap
2 Pensions: pension Mutual scheme contribution retirement plan
2 Import duty: customs Forwarding duty import clearance tariff
2 Canteen: lunch Catering canteen coffee fruit sandwiches
3 Office rent: rent Properties office lease premises court
3 Fuel: fuel Garage diesel petrol pump litres
3 Travel: train Railways flight taxi ticket ferry
3 Electricity: electricity Energy power meter kwh supply
3 Cleaning: cleaning Cleaners windows hygiene laundry waste
3 Vehicle repairs: tyres Motors brakes repair service inspection
3 Heating and water: heating Utilities water gas boiler sewage
3 Hotels: hotel Inn room nights breakfast stay
3 Parking and tolls: parking Carparks toll bridge permit ticket
3 Meals with clients: restaurant Bistro dinner lunch cafe bakery
4 Bank fees: fee Bank charges interest statement commission
4 Software: software Systems licence hosting cloud domain
4 Telephone and internet: phone Telecom broadband mobile internet roaming
4 Insurance: insurance Assurance premium policy cover liability
4 Office supplies: stationery Stationers paper toner office desk
4 Accounting and audit: audit Accountants bookkeeping accounts yearly advice
4 Advertising: advert Media campaign print banner flyer
4 Legal fees: legal Solicitors solicitor notary contract court
4 Postage: postage Mail stamps letters registered franking
4 Memberships: membership Guild association journal subscription chamber
5 Trade debtors: invoice Trading customer settlement receipt credit
5 Bank savings: savings Bank transfer deposit reserve interest
5 Cash: cash ATM withdrawal till float change
5 Prepayments: prepaid Services advance yearly quarter ahead
5 Card clearing: clearing Cards terminal card batch acquirer
5 Deposits paid: deposit Lettings bond lease security key
5 Stock: stock Storage inventory goods warehouse count
5 Staff advances: advance People staff loan wages repay
5 Transfers between accounts: transfer Treasury internal sweep between own
5 Other debtors: refund Recovery claim settlement owed reminder
6 Trade creditors: supplier Supplies invoice settlement goods statement
6 Credit card: card Cards statement monthly balance purchases
6 Bank loan: loan Bank instalment repayment interest mortgage
6 Customers' prepayments: advance Events deposit order booking voucher
6 Expense claims: expenses People claim mileage receipts refund
6 Hire purchase: instalment Leasing finance lease agreement vehicle
6 Accruals: accrual Services correction period yearly reversal
6 Group company: intercompany Holdings group loan recharge parent
6 Gift cards: voucher Gifts gift redeem shop present
6 Overdraft: overdraft Bank limit interest arrangement renewal
7 VAT: vat Revenue return quarter tax settlement
7 Salaries payable: salary People payroll net staff month
7 Payroll tax: payroll Revenue tax withheld month employer
7 Social security: security Fund social contribution employer levy
7 Corporation tax: corporation Revenue tax instalment assessment yearly
7 Pensions payable: pension Mutual contribution scheme month employer
7 Holiday pay: holiday Fund leave pay summer allowance
7 Customs account: customs Forwarding duty import entry account
7 Property tax: property Council rates borough land assessment
7 Vehicle tax: vehicle Licensing tax plates registration van
8 Owner's drawings: private Grocers drawings household owner groceries
8 Computers: laptop Computers monitor computer server tablet
8 Machinery: machine Engineering tool press crane pump
8 Vehicles: van Motors car lorry trailer forklift
8 Furniture: furniture Interiors desk chairs shelves lamps
8 Owner's deposits: capital Family owner deposit private contribution
8 Buildings: building Estates roof extension plot mortgage
8 Dividends: dividend Holdings shares payout profit holder
8 Shop fittings: fittings Joinery counter shelves lights sign
8 Investments: shares Investments bonds fund securities dealing
""".strip().splitlines()
RECURRING = "Maintenance contracts, Subscriptions sold, Rental income, Pensions, Office rent, "
RECURRING += "Bank fees, Software, Telephone and internet, Insurance, Memberships, Bank loan, "
RECURRING += "Hire purchase, Pensions payable, Vehicle tax, Deposits paid, Canteen"
RECURRING = split(RECURRING, ", ")
DEPARTMENTS = split("north south workshop shop abroad events east west online fleet studio")

# What texts say of any account, most used first; phrases where there is room for two words
COMMON = split("""
    payment invoice transfer order Ltd ref purchase fee refund credit deposit Street account
    contract debit receipt customer Group booking charge Services mandate Partners balance
    reminder collection membership instalment Sons statement voucher settlement Road agreement
    bill Court adjustment Bros reversal period delivery Centre quarter Lane repayment Square claim
    Works total client Yard Hall""")
PHRASES = split("""
    card_payment bank_transfer standing_order direct_debit invoice_no online_payment card_purchase
    credit_note payment_ref part_payment transfer_to payment_from monthly_charge order_no
    mobile_payment customer_ref cash_deposit final_bill service_charge foreign_payment
    payment_received annual_fee""")
SAID = {line: split(line.partition(": ")[2]) for line in CHART}
TRADES = {word for word in chain(COMMON, *SAID.values()) if word[0].isupper()}
MONTHS = split("Jan Feb March April May June July Aug Sept Oct Nov Dec")

# Names are a start, perhaps more, and an end; ids of companies are a start, an end and a business
STARTS = split("""
    Ald Amb Bask Birk Brack Brind Cind Clove Corv Crim Dapp Drum Dun Eld Ell Fal Fern Finch Frith
    Gann Garr Gorse Grim Harr Hax Haz Her Iv Jass Jun Kell Kest Lam Larch Lark Linn Lund Map Marl
    Morr Moss Mund Nett Nor Orr Os Ott Pebb Pell Plov Pram Quar Quill Row Rusk Sall Sisk Sorr Tamb
    Tans Tarr Teas Thist Trem Ull Umb Vall Vesp Vetch Whin Will Wix Wren Yarr Yel Zell""")
BETWEEN = split("en er ing el on in es a")
ENDS = split("""
    bourne bury by combe cote croft dale den field fold ford garth gate grove ham holt hurst kirk
    leigh ley lock mere mont moor nook pool rick ridge sett shaw stead stow thorpe toft vale ward
    well wick wold worth""")
BUSINESSES = split("""
    bakery books cafe cycles dental design fabrics farm florist foods garage joinery media motors
    optics print roofing studio tools travel""")
NUMBERS = split("%d %d %d %d INV-%d K%d REF%d T%d")
INITIALS = "ABCDEFGHIJKLMNOPRSTVW"

Account = tuple[str, str, str]  # its name, number and type


class Manner(NamedTuple):
    """How a company uses an account."""

    cents: str  # what sums end in: one of CENTS
    recurs: float  # the share of merchants with a usual sum
    tariff: list[str]  # the usual sums so far
    department: str


class Recurring:
    """Draws of things old and new: a Pitman-Yor process."""

    def __init__(self, rng: Random, discount: float, strength: float, new: Callable[[], Any]):
        self.rng, self.discount, self.strength, self.new = rng, discount, strength, new
        self.drawn = []

    def draw(self) -> Any:
        """A new thing, or an old one, the likelier the more often it was drawn."""
        seat = int(self.rng.random() * (len(self.drawn) + self.strength))
        thing, first = self.drawn[seat] if seat < len(self.drawn) else (None, True)
        new = thing is None or (first and self.rng.random() < self.discount)
        self.drawn.append((self.new() if new else thing, new))
        return self.drawn[-1][0]


def early(rng: Random, things: Sequence, head: float) -> Any:
    """One of the things, number k with probability about 1 / (k + head): Zipf's law."""
    k = int(head * (1 + len(things) / head) ** rng.random() - head)
    return things[min(k, len(things) - 1)]


def company_id(n: int) -> str:
    """The nth id, such as quillmere-bakery."""
    n, business = divmod(n, len(BUSINESSES))
    n, end = divmod(n, len(ENDS))
    n, start = divmod(n, len(STARTS))
    again = f"-{n + 1}" if n else ""
    return f"{STARTS[start]}{ENDS[end]}-{BUSINESSES[business]}{again}".lower()


def name(rng: Random) -> str:
    """A name, or letters that refer to something, in all likelihood new."""
    kind = rng.random()
    if kind < 0.2:
        return "".join(rng.choices("BCDFGHJKLMNPQRSTVWXZ", k=6))
    if kind < 0.35:  # Quillmere-Larchby
        return "-".join(rng.choice(STARTS) + rng.choice(ENDS) for _ in range(2))
    surname = rng.choice(STARTS) + rng.choice(BETWEEN) + rng.choice(ENDS)
    return surname if kind < 0.6 else f"{rng.choice(INITIALS)}.{surname}"


def number(rng: Random) -> str:
    """The number of an invoice, a terminal or a contract, in all likelihood new."""
    return rng.choice(NUMBERS) % rng.randrange(10 ** rng.randint(5, 7))


def open_account(rng: Random, title: str, first: str, digits: int, taken: set[str]) -> Account:
    """A new account. Its number begins with the first digit, was not taken and is now."""
    new = first
    while new == first or new in taken:
        new = first + "".join(rng.choices("0123456789", k=digits - 1))
    taken.add(new)
    return title, new, "Balance" if first >= "5" else "Profit and Loss"


def amount(paid_in: bool, size: float, cents: str, rng: Random) -> str:
    """The BankEntryAmount of 10 ** size: -312.07, or such as -310.00 or -309.95."""
    total = round(10 ** (size + 2))
    if cents == "none":
        step = 10 ** max(2, len(str(total)) - 2)  # 1,200.00 rather than 1,234.00
        total = round(total / step) * step
    elif cents == "price":
        total += rng.choice([90, 95, 99]) - total % 100
    return f"{'' if paid_in else '-'}{max(1, total) / 100:.2f}"


def amount_range(amount: str) -> str:
    """The range that the real set has for a sum: `> -1000` for -312.07; a range stays as it is."""
    if amount[0] in "<>b":
        return amount
    positive, whole = amount[0] != "-", len(amount.lstrip("-").partition(".")[0])
    big, bound = ("big positive", "< ") if positive else ("big negative", "> -")
    return big if whole > 4 else f"{bound}{10**whole}"


class World:
    """What companies share: the standard chart of accounts, words, well-known merchants."""

    def __init__(self, seed: int):
        rng, self.numbers = Random(f"{seed} world"), set()
        entries = {digit: [] for digit in FIRST_DIGITS}
        for department, line in product(["", *DEPARTMENTS], CHART):
            title, said = line[2:].partition(": ")[0], SAID[line]
            if department:
                title, said = f"{title}, {department}", [*said[:2], department, *said[2:]]
            entries[line[0]].append((title, said))
        self.chart, self.topics = [], []
        for first in islice(cycle(FIRST_DIGITS), len(PLACES)):
            title, said = entries[first].pop(0)
            self.chart.append(open_account(rng, title, first, 4, self.numbers))
            self.topics.append(said + [name(rng) for _ in range(TOPIC_WORDS - len(said))])
        self.words = COMMON + [name(rng) for _ in range(COMMON_WORDS - len(COMMON))]
        usual = [early(rng, PLACES, 1.2) for _ in range(SHARED_MERCHANTS)]
        self.merchants = [(self.template(rng, place), place) for place in usual]

    def template(self, rng: Random, place: int) -> list[str]:
        """A new merchant's text: words and codes, and slots that each entry fills anew."""
        slots = rng.choices(*FIRST_SLOTS) + rng.choices(*SLOTS, k=rng.choices(*LENGTHS)[0] - 1)
        phrase = early(rng, PHRASES, 2).split("_") if slots.count("common") > 1 else []
        makers = {"word": lambda: name(rng), "code": lambda: number(rng)}
        makers["topic"] = lambda: early(rng, self.topics[place], 1)
        makers["common"] = lambda: phrase.pop(0) if phrase else early(rng, self.words, 2)
        parts, kinds = [], []
        for slot in slots:
            part = makers[slot]() if slot in makers else slot
            if slot in makers and part in parts:
                part = name(rng)  # rather than a word twice
            parts.append(part)
            kinds.append(ORDER.index("trade" if part in TRADES else slot))
        rest = sorted(range(1, len(parts)), key=kinds.__getitem__)
        return [parts[i] for i in (0, *rest)]


class Company:
    """A company's books: its chart of accounts, and what it makes of the merchants it meets."""

    def __init__(self, world: World, id: str, rng: Random, aside: Random):
        self.world, self.id, self.rng = world, id, rng
        self.aside = aside  # for sums and departments: all else is as it would be without these
        self.chart, self.numbers = {}, set(world.numbers)
        self.house_chart = rng.random() < HOUSE_CHART
        self.digits = rng.randint(4, 7) if self.house_chart else 4
        self.places = Recurring(rng, *ACCOUNTS, lambda: early(rng, PLACES, 1.2))
        self.habits = Recurring(rng, *MERCHANTS, self.meet)
        self.departments = aside.sample(DEPARTMENTS, aside.choice(STAFFED))
        self.manners = {}  # by account

    def account(self, place: int) -> Account:
        """The account that the company keeps in a place of the standard chart."""
        if place not in self.chart:
            account = self.world.chart[place]
            if self.house_chart or (place >= CORE_PLACES and self.rng.random() < OWN_ACCOUNT):
                title, first = account[0], account[1][0]
                account = open_account(self.rng, title, first, self.digits, self.numbers)
            self.chart[place] = account
        return self.chart[place]

    def meet(self) -> tuple:
        """A new merchant's template, account, doubt, second account, sign, size (log10), deals."""
        rng, place = self.rng, self.places.draw()
        if rng.random() < MERCHANT_IS_SHARED:
            template, usual = early(rng, self.world.merchants, 3)
            place = usual if rng.random() < BOOKED_AS_USUAL else place
        else:
            template = self.world.template(rng, place)
        account = self.account(place)
        doubt = rng.random() / 2 if rng.random() < DOUBTFUL else 0
        second = self.account(self.places.draw()) if doubt else account
        paid_in = rng.random() < PAYS_IN.get(account[1][0], 0.5)
        mean, sd = PAID_IN if paid_in else PAID_OUT
        size = rng.gauss(mean, (sd**2 - MERCHANT_SPREAD**2) ** 0.5)
        return template, account, doubt, second, paid_in, size, {}

    def manner(self, account: Account) -> Manner:
        """How the company uses the account."""
        if account not in self.manners:
            title, _, part = account[0].partition(", ")
            recurs = RECURS if title in RECURRING else RECURS_ELSEWHERE
            named = self.departments and part in DEPARTMENTS  # Sales, north
            department = part if named else self.any_department()
            self.manners[account] = Manner(self.aside.choices(*CENTS)[0], recurs, [], department)
        return self.manners[account]

    def deal(self, account: Account, paid_in: bool, size: float) -> tuple[str, str]:
        """A merchant's usual sum for what is booked to an account, or none, and its department."""
        aside, manner, usual = self.aside, self.manner(account), ""
        if aside.random() < manner.recurs:
            usual = amount(paid_in, size, manner.cents, aside)
            if manner.tariff and aside.random() < FROM_TARIFF:
                usual = aside.choice(manner.tariff)
            manner.tariff.append(usual)
        at_home = aside.random() < AT_HOME
        return usual, manner.department if at_home else self.any_department()

    def any_department(self) -> str:
        """One of the company's departments, the first ones most often."""
        return early(self.aside, self.departments, 1) if self.departments else ""

    def said_department(self, department: str) -> str:
        """What an entry says of its department."""
        if self.aside.random() < UNSAID:
            return ""
        return (self.any_department() if self.aside.random() < MISTAKEN else department).title()

    def rows(self, n: int) -> Iterator[tuple[str, ...]]:
        """n rows without their index, oldest first."""
        rng, entry = self.rng, None
        first = rng.choice(OPENINGS)
        days = (len(WORKDAYS) - first) * min(1, 1.1 * rng.random() ** 0.5)
        for workday in sorted(first + int(days * rng.random()) for _ in range(n)):
            day, chance = WORKDAYS[workday], rng.random()
            if entry is None or chance >= REPEATED + SPLIT:
                template, account, doubt, second, paid_in, size, deals = self.habits.draw()
                account = second if rng.random() < doubt else account
                size = rng.gauss(size, MERCHANT_SPREAD)
                if account not in deals:
                    deals[account] = self.deal(account, paid_in, size)
                usual, department = deals[account]
                if not usual or self.aside.random() >= USUAL:
                    usual = amount(paid_in, size, self.manner(account).cents, self.aside)
                entry = self.id, day, self.text(template, day), usual
                said = self.said_department(department)
            elif chance >= REPEATED:
                account = self.account(self.places.draw())
                said = self.said_department(self.manner(account).department)
            yield *entry, *account, said

    def text(self, template: list[str], day: str) -> str:
        """The text of an entry: the template with its slots filled."""
        rng, parts = self.rng, []
        for part in template:
            if part == "<name>":
                part = name(rng)
            elif part == "<number>":
                part = day[5:].replace("-", "/") if rng.random() < DATED else number(rng)
            elif part == "<term>":
                named = rng.random() < MONTH_IS_NAMED
                part = MONTHS[int(day[5:7]) - 1] if named else early(rng, self.world.words, 300)
            parts.append(part)
        text = " ".join(parts)
        return text[0].upper() + text[1:]


def synthesize(rows: int, companies: int, seed: int) -> Iterator[tuple]:
    """The rows, company by company, newest first; only one company's are in memory."""
    rng, world, start = Random(f"{seed} companies"), World(seed), 0
    ids = rng.sample(range(max(2 * companies, 60_000)), companies)
    # Sizes are evenly spaced quantiles of a log-normal, so that a few companies look like many.
    quantiles = [NormalDist().inv_cdf((i + 0.5) / companies) for i in range(companies)]
    ends = [*accumulate(exp(SIZE_SPREAD * z) for z in rng.sample(quantiles, companies))]
    for id, end in zip(map(company_id, ids), ends, strict=True):
        end = round(rows * end / ends[-1])
        aside = Random(f"{seed} sums and departments of {id}")
        company = Company(world, id, Random(f"{seed} books of {id}"), aside)
        for index, row in enumerate(reversed(list(company.rows(end - start))), start):
            yield index, *row
        start = end


def numeric(word: str) -> bool:
    """Whether a word has a digit. Of the words that the real set hides it says so itself."""
    return word[:4] == "int:" or (word[:4] != "str:" and any(map(str.isdigit, word)))


def describe(rows: Iterable[Sequence]) -> dict[str, str]:
    """The real data set's published figures for these rows; "new" counts the first row of each.

    Behind them, those of sums and departments, which the real set has not.
    """
    _, *columns = zip(*rows, strict=True)
    companies, dates, texts, amounts, _, numbers, types, *departments = columns
    lengths = [len(text.split()) for text in texts]
    accounts, words = Counter(numbers), Counter(w for text in texts for w in text.split())
    charts = set(zip(companies, numbers, strict=True))
    own_texts = set(zip(companies, texts, strict=True))
    account_users = Counter(number for _, number in charts)
    word_users = Counter(w for _, w in {(c, w) for c, text in own_texts for w in text.split()})

    def share(counts: Iterable[int], whole: int = len(texts)) -> str:
        return f"{sum(counts) / max(whole, 1):.1%}"

    def shares(values: Iterable) -> str:
        return ", ".join(f"{k}: {share([v])}" for k, v in Counter(values).most_common())

    def deciles(values: Iterable) -> str:
        counts = sorted(Counter(values).values())
        return ", ".join(str(counts[len(counts) * i // 10]) for i in range(10)) + f", {counts[-1]}"

    return {
        "rows, companies": f"{len(texts)}, {len({*companies})}",
        "rows per company, deciles": deciles(companies),
        "accounts per company, deciles": deciles(company for company, _ in charts),
        "distinct accounts": f"{len(accounts)}",
        "- rows in the top ten": share(count for _, count in accounts.most_common(10)),
        "- in one company only": share((n == 1 for n in account_users.values()), len(accounts)),
        "- new to its company": share([len(charts)]),
        "words per text, 6 or more as 6": shares(min(length, 6) for length in lengths),
        "- mean and most": f"{words.total() / len(texts):.2f}, {max(lengths)}",
        "distinct words": f"{len(words)}",
        "- that occur once": share((n == 1 for n in words.values()), len(words)),
        "- in several companies": share((n > 1 for n in word_users.values()), len(words)),
        "- numeric": share((n for w, n in words.items() if numeric(w)), words.total()),
        "distinct texts": f"{len({*texts})}",
        "- new to its company, of rows": share([len(own_texts)]),
        "amounts": shares(map(amount_range, amounts)),
        "AccountTypeName": shares(types),
        "exact duplicate rows": share([len(texts) - len(set(zip(*columns, strict=True)))]),
        "dates": f"{min(dates)} to {max(dates)}",
        "digits of AccountNumber, of rows": shares(map(len, numbers)),
        "amounts new to their company": share([len(set(zip(companies, amounts, strict=True)))]),
        "Department": ", ".join(map(shares, departments)),
    }


def read(file: str) -> list[list[str]]:
    """The rows of a CSV file, or of the first file in a .zip."""
    data = Path(file).read_bytes()
    if file.endswith(".zip"):
        archive = zipfile.ZipFile(io.BytesIO(data))
        data = archive.read(archive.namelist()[0])
    table = list(csv.reader(io.StringIO(data.decode())))
    if len(table) < 2 or table[0] not in (COLUMNS, ALL_COLUMNS):
        raise ValueError(f"{file} has no rows under the columns {','.join(COLUMNS)}")
    return table[1:]


def write(rows: Iterable[Sequence], file: str) -> None:
    """Write the rows as CSV: to standard output (-), into a .zip, or into any other file."""
    with ExitStack() as files:
        if file.endswith(".zip"):  # with a fixed date and mode: the same rows make the same bytes
            name = Path(file).stem.removesuffix(".csv") + ".csv"
            member = zipfile.ZipInfo(name, (2016, 9, 21, 0, 0, 0))
            member.compress_type, member.external_attr = zipfile.ZIP_BZIP2, 0o644 << 16
            archive = files.enter_context(zipfile.ZipFile(file, "w"))
            raw = files.enter_context(archive.open(member, "w"))
        else:
            stdout = file == "-"
            raw = files.enter_context(open(1 if stdout else file, "wb", closefd=not stdout))
        out = files.enter_context(io.TextIOWrapper(raw, "utf-8", newline=""))
        csv.writer(out, lineterminator="\n").writerows(chain([ALL_COLUMNS], rows))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--rows", type=int, default=20_000, help="default: 20,000")
    option("--companies", type=int, help="default: one for every 500 rows")
    option("--seed", type=int, default=77, help="default: 77")
    option(
        "--out", default=str(FILE), help=f".zip, .csv, or - for stdout; default: data/{FILE.name}"
    )
    help = "write nothing; print the figures of FILE, or of the set that would be written"
    option("--describe", nargs="?", const="", metavar="FILE", help=help)
    args = parser.parse_args()
    if args.companies is None:
        args.companies = max(1, args.rows // ROWS_PER_COMPANY)
    if not all(1 <= number <= 10_000_000 for number in (args.rows, args.companies)):
        parser.error("--rows and --companies must be from 1 to 10,000,000")
    rows = synthesize(args.rows, args.companies, args.seed)
    try:
        if args.describe is None:
            write(rows, args.out)
        else:
            for figure, value in describe(read(args.describe) if args.describe else rows).items():
                print(f"{figure:<34}{value}")
    except BrokenPipeError:
        pass  # whoever reads standard output, such as head, has had enough
    except (OSError, ValueError, IndexError, zipfile.BadZipFile) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
