"""bookkeep_extra/files.py: files as banks and accounting programs write them, each in few rows."""

import csv
import io
import itertools
import logging
import re
import sys
import zipfile
from datetime import datetime

import pytest
from openpyxl import Workbook

from bookkeep_extra import files
from conftest import booking, write_csv

NAMES = {"text": "Description", "amount": "Amount", "date": "Date", "account": "Category"}


def table(content, columns=None, encoding=None, booked=True, **how):
    """The table in a CSV file with this content, of the company A."""
    data = content if isinstance(content, bytes) else content.encode()
    source = files.Text(io.BytesIO(data), encoding, files.wanted_names(columns or {}))
    how = {"company": "A", "booked": booked, "guess": columns is None, **how}
    return files.Table(source, "bank.csv", columns, **how)


def values(found, *keys):
    """The values of these keys in each sample of a table, or of one key."""
    rows = [[sample.get(key) for key in keys] for sample in found.samples()]
    return [value for [value] in rows] if len(keys) == 1 else rows


def amounts(written, header="Date,Description,Amount,Category"):
    """What amounts in a file are read as."""
    rows = io.StringIO()
    for i, amount in enumerate(written):
        csv.writer(rows).writerow(["2024-01-01", f"shop {i}", amount, "Food"])
    return values(table(f"{header}\n{rows.getvalue()}", NAMES), "BankEntryAmount")


# ------------------------------------------------------------------------------------------ Amounts


@pytest.mark.parametrize(
    ("read", "written"),
    [
        ("-21.59", "- $21.59|-$21.59|$-21.59|($21.59)|21.59-|−21.59|—21.59|‑21.59|－２１．５９"),
        (
            "-21.59",
            "21.59 Dr|21.59DR|DR 21.59|21.59 D|21.59 Debit|(21.59) Dr|-21.59 Dr|USD 21.59 DB",
        ),
        ("-21.59", "21.59 (Dr)|▲21.59|△ 21.59|21.59 –|21.59 EUR S|USD(21.59)|-$ 21.59"),
        ("21.59", "21.59(Cr)|Rs.21.59/-|£21.59CR|Cr 21.59|EUR 21.59 H|CHF21.59|21.59 USD Cr"),
        ("-21.59", "(-21.59)|-EUR 21.59|EUR -21.59|-CA$21.59|21.59 S|Soll 21.59|EUR 21.59-"),
        ("21.59", "21.59 Cr|21.59CR.|21.59 C|21.59 H|+ £21.59|+21.59|21.59+|A$21.59|R$ 21.59"),
        ("21.59", "21.59€|€21.59|R 21.59|R21.59|Rs. 21.59|Rs 21.59|INR 21.59|21.59 zł|21.59 lei"),
        ("21.59", "21.59 лв.|21.59 руб.|21.59 Kč|kr. 21.59|Fr. 21.59|SFr. 21.59|S/ 21.59|RM21.59"),
        ("21.59", '\'21.59|="21.59"|２１．５９|\u00a021.59\u00a0|21.59\u202f€|TL 21.59|21.59 Euro'),
        (
            "1234",
            "1,234円|￥1,234|¥1,234|\\1,234|1’234|1'234|1´234|1 234|1\u202f234|1,234.-|NT$1,234",
        ),
        ("123456.78", "1,23,456.78|₹ 1,23,456.78|123,456.78|123 456.78|123'456.78"),
        ("1200", "1.2E+03|1.2E3"),
        ("0.23", "$.23|.23"),
        (None, "S1|D21.59|--21.59|21.59 Dr Cr|-21.59 Cr|12/13|n/a|31.12.2024|12.50*"),
        (None, "1.2.3|> -1000|pending"),
    ],
)
def test_amounts_are_read_as_people_write_them(read, written):
    for amount in written.split("|"):
        assert amounts([amount, "1.25"])[0] == (read or amount), amount


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["-1.200,50 €", "12,5", "1.000"], ["-1200.50", "12.5", "1000"]),
        (["100,-", "12,50", "1.200,--"], ["100", "12.50", "1200"]),
        (["1 200,50 zł", "-3,00 zł"], ["1200.50", "-3.00"]),
        (["12,50 S", "12,50 H"], ["-12.50", "12.50"]),
        (["1,2E+03", "0,5"], ["1200", "0.5"]),
        # One that contradicts twenty others is left out; half of them is too much.
        ([*["12,50"] * 30, "12.50"], ["12.50"] * 30),
        ([*["1.200"] * 30, "1,200"], [*["1200"] * 30, "1.200"]),
        (["12,50", "12.50"], "writes amounts in two ways: 12,50 in line 2 and 12.50 in line 3"),
    ],
)
def test_all_of_a_column_decides_what_its_marks_mean(written, read):
    if isinstance(read, str):
        with pytest.raises(files.Failed, match=read):
            amounts(written)
    else:
        assert amounts(written) == read


def test_words_in_place_of_numbers_are_said_but_for_ranges(caplog):
    amounts(["> -1000", "< 10", "big negative"])
    assert caplog.text == ""
    amounts(["12 o'clock", "soon"])
    assert "amounts such as 12 o'clock in line 2 are no numbers; they stay" in caplog.text


TWO = "Date,Description,Debit,Credit,Category\n"
IN_TWO = {"text": "Description", "out": "Debit", "in": "Credit", "account": "Category"}


@pytest.mark.parametrize(
    ("rows", "read"),
    [
        (
            ["20,", ",500", "3.5,0", "0.00,7", '"1,200.00",-'],
            ["-20", "500", "-3.5", "7", "-1200.00"],
        ),
        (["-20,", ",500", "-3,"], ["-20", "500", "-3"]),  # money out that has its sign already
        (["20,", "-5,", "3,", ",-7"], ["-20", "5", "-3", "-7"]),  # and reversals
        (["$20.00,", ",$5.00"], ["-20.00", "5.00"]),
        (["20,30", "20,", ",", "x,"], ["-20"]),  # both at once, neither, and a word
    ],
)
def test_money_out_and_in_in_two_columns_has_its_sign(rows, read):
    content = TWO + "".join(f"2024-01-02,shop,{row},Food\n" for row in rows)
    assert values(table(content, IN_TWO), "BankEntryAmount") == read
    if len(rows) > 4:
        assert values(table(content), "BankEntryAmount") == read  # guessed


def test_both_sides_at_once_is_said(caplog):
    table(f"{TWO}2024-01-02,shop,20,30,Food\n2024-01-02,shop,20,,Food\n", IN_TWO).say()
    assert "1 of 2 rows left out, the first in line 2: it has money out and in at once, -20 a" in (
        caplog.text
    )


def test_two_columns_are_no_amount():
    with pytest.raises(files.Failed, match=r"--map takes amount=.* or out= and in=, not both"):
        table(f"{TWO}2024-01-02,shop,20,,Food\n", IN_TWO | {"amount": "Debit"})
    with pytest.raises(
        files.Failed, match=r"amount=Debit.Credit names 2 columns.*out=COLUMN,in=CO"
    ):
        table(f"{TWO}2024-01-02,shop,20,,Food\n", NAMES | {"amount": "Debit+Credit"})


@pytest.mark.parametrize(
    ("out", "in_"),
    [
        *(("D", "C"), ("Dr", "Cr"), ("DBIT", "CRDT"), ("debit", "Credit"), ("-", "+"), ("S", "H")),
        *(("Soll", "Haben"), ("Af", "Bij"), ("Débit", "Crédit"), ("Cargo", "Abono"), ("OUT", "IN")),
    ],
)
def test_a_column_may_have_the_sign(out, in_, caplog):
    rows = "".join(
        f"2024-01-0{i},shop,{i}.50,{side},Food\n" for i, side in ((1, out), (2, in_)) for _ in "ab"
    )
    content = f"Date,Description,Amount,Side,Category\n{rows}"
    read = ["-1.50", "-1.50", "2.50", "2.50"]
    assert values(table(content, NAMES | {"sign": "Side"}), "BankEntryAmount") == read
    assert values(table(content), "BankEntryAmount") == read  # guessed
    with caplog.at_level(logging.INFO):
        table(content.replace("1.50", "-1.50"), NAMES | {"sign": "Side"}).say()
    assert "that of the column counts" in caplog.text
    wrong = content.replace(f",{out},", ",?,")
    found = table(wrong, NAMES | {"sign": "Side"})
    assert values(found, "BankEntryAmount") == ["2.50", "2.50"]
    found.say()
    assert 'it has the sign "?"' in caplog.text


# -------------------------------------------------------------------------------------------- Dates


@pytest.mark.parametrize(
    ("dates", "read"),
    [
        ("2016-2-29|2016-10-01", "2016-02-29|2016-10-01"),
        ("2012/3/22|2012/12/2", "2012-03-22|2012-12-02"),
        ("2012.03.22|2012.12.02.", "2012-03-22|2012-12-02"),
        ("31. 3. 2020|5. 4. 2020", "2020-03-31|2020-04-05"),
        ("31.3.20|05.04.20", "2020-03-31|2020-04-05"),
        ("31-3-2020|5-4-2020", "2020-03-31|2020-04-05"),
        ("31/3/99|5/4/99", "1999-03-31|1999-04-05"),
        ("3/31/2020|4/5/2020", "2020-03-31|2020-04-05"),
        ("20190228|20191201", "2019-02-28|2019-12-01"),
        ("28022019|01122019", "2019-02-28|2019-12-01"),
        ("02282019|12012019", "2019-02-28|2019-12-01"),
        ("280219|011219", "2019-02-28|2019-12-01"),
        ("16-02-29|15-12-01", "2016-02-29|2015-12-01"),
        ("2020年3月5日|2020年12月31日", "2020-03-05|2020-12-31"),
        ("２０２０／３／５|２０２０／１２／３１", "2020-03-05|2020-12-31"),
        (
            "令和2年3月5日|令和元年12月31日|R2.3.5|H30.4.1",
            "2020-03-05|2019-12-31|2020-03-05|2018-04-01",
        ),
        ("2020/03/05(木)|2020/12/31(木)", "2020-03-05|2020-12-31"),
        ("2020년 3월 5일|2020. 12. 31.", "2020-03-05|2020-12-31"),
        ("3/28/2008 11:12 PM|4/1/2008 12:00 AM", "2008-03-28T23:12|2008-04-01"),
        ("28.02.2019 14:05|01.03.2019, 09:10:11", "2019-02-28T14:05|2019-03-01T09:10:11"),
        ("2020-03-05 10:00:00|2020-03-06T10:00:00Z", "2020-03-05T10:00:00|2020-03-06T10:00:00"),
        ("2020-03-05T10:00:00.000+01:00|20200306120000", "2020-03-05T10:00:00|2020-03-06T12:00:00"),
        ("20200306T120000|2020-03-05 00:00:00", "2020-03-06T12:00:00|2020-03-05"),
        ("Mon 28/02/2019|Tue 01/03/2019", "2019-02-28|2019-03-01"),
        (
            "07 Nov 2013|1 Apr 14|28-Oct-2010|05MAR2020",
            "2013-11-07|2014-04-01|2010-10-28|2020-03-05",
        ),
        ("Nov 30, 2013|December 1, 2013|Mon, 05 Mar 2020", "2013-11-30|2013-12-01|2020-03-05"),
        ("March 5th, 2020|2020-Mar-06|7 Nov 2013 10:15", "2020-03-05|2020-03-06|2013-11-07T10:15"),
        (
            "7. März 2020|07 Mär 2020|3. Mai 2021|1. Dez. 20",
            "2020-03-07|2020-03-07|2021-05-03|2020-12-01",
        ),
        ("01 févr. 2021|1er août 2020|15 déc. 2020", "2021-02-01|2020-08-01|2020-12-15"),
        ("15 ago 2020|15 de agosto de 2020|3 ene 2020", "2020-08-15|2020-08-15|2020-01-03"),
        ("10 gen 2020|3 mag 2020|1 settembre 2020", "2020-01-10|2020-05-03|2020-09-01"),
        ("3 set 2020|10 dez 2020|1 fev 2020", "2020-09-03|2020-12-10|2020-02-01"),
        ("5 mrt 2020|5 mei 2020|1 okt 2020", "2020-03-05|2020-05-05|2020-10-01"),
        ("3 kwi 2020|3 kwietnia 2020|1 wrz 2020", "2020-04-03|2020-04-03|2020-09-01"),
        ("3. dubna 2020|1. září 2020", "2020-04-03|2020-09-01"),
        ("3 maj 2020|3 okt 2020|1 januari 2020", "2020-05-03|2020-10-03|2020-01-01"),
        ("5 марта 2020|05 май 2020|1 окт. 2020", "2020-03-05|2020-05-05|2020-10-01"),
        ("2020. március 5.|2020. május 1.", "2020-03-05|2020-05-01"),
        ("5 Mart 2020|5 Ağustos 2020", "2020-03-05|2020-08-05"),
        # Some are clear, so all are.
        ("01/02/2024|13/02/2024", "2024-02-01|2024-02-13"),
        ("05/05/2024|06/06/2024", "2024-05-05|2024-06-06"),
        # What is none stays out.
        ("29.02.2016|pending|30.02.2016|Total|12|2016|5.3.|-", "2016-02-29|||||||"),
    ],
)
def test_dates_are_read_as_banks_write_them(dates, read):
    written = dates.split("|")
    found = files.read_dates(written)
    assert [found.get(date, "") for date in written] == read.split("|")


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (["01/02/2024", "03/02/2024"], "what is the day in 01/02/2024 is not clear"),
        (["01/02/2024", "02 Mar 2024"], "what is the day in 01/02/2024 is not clear"),
        (["01-02-03", "02-03-04"], "what is the day in 01-02-03 is not clear"),
        (["13/02/2016", "02/13/2016"], "in two ways, as 13/02/2016 and 02/13/2016"),
    ],
)
def test_dates_that_are_not_clear_are_refused(dates, message):
    with pytest.raises(files.Failed, match=f"{message}; replay.py --order file"):
        files.read_dates(dates)
    content = "Date,Description,Amount,Category\n" + "".join(f"{d},shop,1,Food\n" for d in dates)
    rows = list(table(content).samples())
    assert [row["BankEntryDate"] for row in rows] == dates  # which --order file sends as they stand
    with pytest.raises(files.Failed, match=message):
        files.by_date(rows)


def test_one_row_without_a_date_does_not_cost_the_others(caplog):
    content = "Date;Description;Amount;Category\n" + "".join(
        f"{day}.03.2024;shop;1;Food\n" for day in range(1, 31)
    )
    found = table(f"{content}pending;shop;1;Food\n;Closing balance;9;\n", NAMES)
    assert len(files.by_date(found.samples())) == 30
    found.say()
    assert "2 of 32 rows left out, the first in line 32: it has the date pending" in caplog.text
    with pytest.raises(files.Failed, match="pending is no date"):
        files.by_date(table(f"{content[:79]}pending;shop;1;Food\n", NAMES).samples())


# ------------------------------------------------------------------------------------------- Tables


@pytest.mark.parametrize(
    ("content", "columns", "texts"),
    [
        # A preamble, sep=, blank lines, and a header that stands again.
        (
            "Account;1\nFrom;1.1.2024\n\nDate;Description;Amount;Category\n1.1.2024;a;1,5;F\n",
            {},
            "a",
        ),
        ("sep=;\r\nDate;Description;Amount;Category\r\n1.1.2024;a;1,5;F\r\n", {}, "a"),
        ('"sep=|"\nDate|Description|Amount|Category\n1.1.2024|a|1,5|F\n', {}, "a"),
        (
            "\n\nDate,Description,Amount,Category\n\n2024-01-01,a,1,F\n,,,\n\n2024-01-01,b,1,F\n",
            {},
            "a b",
        ),
        (
            "Date,Description,Amount,Category\n2024-01-01,a,1,F\n"
            "Date,Description,Amount,Category\n2024-01-01,b,1,F\n",
            {},
            "a b",
        ),
        # Names by number, without names, and twice.
        (
            "1.1.2024;a;1,5;F\n2.1.2024;b;1,5;F\n",
            {"date": "1", "text": "2", "amount": "3", "account": "4"},
            "a b",
        ),
        ("a,1,F\n", {"text": "1", "amount": "2", "account": "3"}, "a"),
        ("Name,Name,Sum,To\nx,a,1,F\n", {"text": "2", "amount": "Sum", "account": "To"}, "a"),
        ("Name,Name,Sum,To\nx,a,1,F\n", {"text": "Name (2)", "amount": "Sum", "account": "4"}, "a"),
        # Names with spaces, line breaks, commas or a plus, in upper case.
        ('Date, Description ," Amount",Category\n2024-01-01, a , 1 ,F\n', {}, "a"),
        ('Date,"Desc\nription",Amount,Category\n2024-01-01,a,1,F\n', {"text": "Desc ription"}, "a"),
        ("Date,Payee+Purpose,Amount,Category\n2024-01-01,a,1,F\n", {"text": "Payee+Purpose"}, "a"),
        (
            "Date,Payee,Purpose,C++,Amount,Category\n2024-01-01,a,b,c,1,F\n",
            {"text": "Payee+C+++Purpose"},
            "a_c_b",
        ),
        ("DATE,DESCRIPTION,AMOUNT,CATEGORY\n2024-01-01,a,1,F\n", {}, "a"),
        # Trailing separators, values that lack at the end, totals, and one too many.
        ("Date,Description,Amount,Category\n2024-01-01,a,1,F,\n2024-01-01,b,1,F,,\n", {}, "a b"),
        ("Date,Description,Amount,Category,\n2024-01-01,a,1,F\nTotal,1\n", {}, "a"),
        ("Date,Description,Amount,Category\n2024-01-01,a,1,F\n2024-01-01,b, c,1,F\n", {}, "a"),
        # Quotes in quotes, quotes that are never closed, values over several lines.
        (
            'Date,Description,Amount,Category\n2024-01-01,"a "b" c",1,F\n2024-01-01,b,1,F\n',
            {},
            'a_b"_c" b',
        ),
        ('Date,Description,Amount,Category\n2024-01-01,"a,1,F\n2024-01-01,"b",1,F\n', {}, '"a b'),
        ('Date,Description,Amount,Category\n2024-01-01,a "x,1,F\n2024-01-01,b,1,F\n', {}, 'a_"x b'),
        (
            'Date,Description,Amount,Category\n2024-01-01,"a\nx",1,F\n2024-01-01,b,1,F\n',
            {},
            "a\nx b",
        ),
        ("Date,Description,Amount,Category\r2024-01-01,a,1,F\r2024-01-01,b,1,F\r", {}, "a b"),
        ("'Date','Description','Amount','Category'\n'2024-01-01','a','1','F'\n", {}, "a"),
    ],
)
def test_rows_are_found_in_files_of_all_kinds(content, columns, texts):
    named = columns if "amount" in columns else NAMES | columns
    found = table(content, named)
    assert values(found, "BankEntryText") == [text.replace("_", " ") for text in texts.split(" ")]
    assert {*values(found, "AccountNumber")} == {"F"}
    assert {amount.replace(".5", "") for amount in values(found, "BankEntryAmount")} == {"1"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "x\n\nDate,Description,Amount,Category\n2024-01-01,a,1,F\n",
            "the names of its columns in line 3; t",
        ),
        (
            "Date,Description,Amount,Category\n2024-01-01,a,1,F\n,,5,\n",
            "1 of 2 rows left out, the first in line 3: it has no text",
        ),
        (
            "Date,Description,Amount,Category\n2024-01-01,a,1,F\n2024-01-01,a, b,1,F\n",
            "in line 3: it has 5 values for 4 columns",
        ),
        (
            "Date;Description;Amount;Category\n1.2.2024;a;1,5;F\n",
            'semicolons; text=Description,amount=Amount,account=Category,date=Date; "1,5" is 1.5; '
            '"1.2.2024" is 2024-02-01',
        ),
        (
            "Date,Description,Amount,Category\n2024-01-01,a,1,Food\n2024-01-01,a,1,food\n",
            'accounts "Food" and "food" are two, as they are written',
        ),
        (
            b"Date,Description,Amount,Category\n2024-01-01,\xc3\xa4,1,F\n2024-01-01,\xe4,1,F\n",
            "what is no UTF-8 in line 3 is taken for Windows-1252",
        ),
        (
            "Date,Description,Amount,Category\n2024-01-01,a,1,F\n,Balance,9,F\n,,\n",
            "1 of 2 rows left out, the first in line 3: it has no date",
        ),
        (
            "Date,Description,Amount,Category,BookedBy\n2024-01-01,a,1,F,suggestion\n",
            'BookedBy is "suggestion" in 1 of 1 rows, which teach nothing until somebody writes',
        ),
    ],
)
def test_how_a_file_was_read_is_said(content, said, caplog):
    with caplog.at_level(logging.INFO):
        table(content, NAMES).say()
    assert said in caplog.text


def test_a_plain_file_needs_no_words(caplog):
    with caplog.at_level(logging.INFO):
        table("BankEntryText,BankEntryAmount,AccountNumber,BankEntryDate\na,1,F,2024-01-01\n").say()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (
            "Date,Description,Amount,Category\n2024-01-01,a,1,F\n",
            {"text": "Payee"},
            "no column Payee; it has Date, Desc",
        ),
        (
            "1.1.2024;a;1,5;F\n",
            {"text": "Payee"},
            "no column Payee.*no names of columns but numbers, as 1=1.1.2024, 2=a,",
        ),
        (
            "Date,A,A,Amount,Category\n2024-01-01,a,b,1,F\n",
            {"text": "A"},
            "column A more than once, as 2 and 3: name it by",
        ),
        (
            "Date,Description,Amount,Category\n" + "2024-01-01,a,b,1,F\n" * 9,
            {},
            "9 of 9 rows are no bookings: in line 2, it has 5 values for 4 col",
        ),
        (
            "Date,Description,Amount,Category\n2024-01-01,a,1,\n",
            {},
            "there are no bookings in bank.csv: in line 2, it has no account",
        ),
        (
            "Date,Description,Amount,Category,BookedBy\n2024-01-01,a,1,F,Anna\n",
            {},
            "not Anna; --map by=COLUMN names another",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_way_out(content, columns, message):
    with pytest.raises(files.Failed, match=message):
        table(content, NAMES | columns).say()


def test_who_booked_it_may_be_in_another_column():
    rows = "2024-01-01,a,1,F,Anna,check\n2024-01-01,a,1,F,,\n"
    content = f"Date,Description,Amount,Category,BookedBy,Who\n{rows}"
    assert values(table(content, NAMES | {"by": "Who"}), "BookedBy") == ["check", None]


@pytest.mark.parametrize(
    "encoding", ["cp1252", "cp1250", "iso8859-15", "cp850", "mac_roman", "utf-16-le", "utf-8-sig"]
)
def test_a_german_file_of_any_encoding(encoding):
    content = "Datum;Empfänger;Betrag;Konto\n" + "".join(
        f"{day}.01.2024;{name};-1,50;{name}\n"
        for day, name in enumerate(("Bäckerei Müller", "Jägersteig", "Straße Öl", "Größe"), 1)
        for _ in "ab"
    )
    assert {*values(table(content.encode(encoding)), "BankEntryText")} == {
        *("Bäckerei Müller", "Jägersteig", "Straße Öl", "Größe")
    }


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("ŻABKA Łódź", "cp1250"),
        ("Příjem z účtu, Žižkov", "cp1250"),
        ("Příjem z účtu, Žižkov", "iso8859-2"),
        ("Магазин Пятёрочка", "cp1251"),
        ("Магазин Пятёрочка", "koi8-r"),
        ("Σούπερ μάρκετ Αθήνα", "cp1253"),
        ("Şişli Market İstanbul", "cp1254"),
        ("コンビニ 東京駅", "cp932"),
        ("コンビニ 東京駅", "euc_jp"),
        ("超市购物 北京", "gb18030"),
        ("超市購物 台北", "big5"),
        ("편의점 서울", "cp949"),
        ("Café à Paris, prélèvement", "cp1252"),
        ("Købmand Sørensen, Ærø", "cp1252"),
        ("Købmand Sørensen, Ærø", "cp865"),
        ("Año nuevo, peluquería", "cp1252"),
        ("12,50 €", "cp1252"),
    ],
)
def test_the_encoding_is_found_out(text, encoding):
    content = f"Date;Description;Amount;Category\n01.02.2024;{text};-12,50;A\n"
    found = table(content.encode(encoding), NAMES)
    assert values(found, "BankEntryText") == [text]
    assert found.source.encoding.upper() in str(found.source)
    assert values(table(content.encode(encoding), NAMES, encoding), "BankEntryText") == [text]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_few_odd_bytes_do_not_make_utf_8_another_encoding(start):
    header = b"Date,Description,Amount,Category\n"
    good = "2024-01-01,Bäckerei,1,F\n".encode()
    found = table(start + header + good + "2024-01-01,Jägersteig,1,F\n".encode("cp1252"), NAMES)
    assert values(found, "BankEntryText") == ["Bäckerei", "Jägersteig"]
    assert found.source.odd_bytes == [3]


def test_an_encoding_that_is_wrong_is_refused(tmp_path):
    path = tmp_path / "bank.csv"
    path.write_bytes("Date,Description,Amount,Category\n2024-01-01,ä,1,F\n".encode("cp1252"))
    for encoding, message in (
        ("utf-8", "'utf-8' codec can't decode"),
        ("utf-9", "utf-9 is no enc"),
    ):
        with pytest.raises(files.Failed, match=message):
            list(files.read_rows(path, NAMES, "A", encoding=encoding))


# ----------------------------------------------------------------------------------------- Guesses

GUESSES = [
    ("Date,Description,Amount,Category", "2024-01-02,shop {i},-{i}.50,{k}", NAMES),
    (
        "Buchungstag;Valutadatum;Auftraggeber/Empfänger;Verwendungszweck;Betrag;Saldo;Währung;Sachkonto",
        "02.01.2024;03.01.2024;Müller {i};Miete {i};-{i},50;{i}00,00;EUR;{k}",
        {
            **{"date": "Buchungstag", "text": "Auftraggeber/Empfänger+Verwendungszweck"},
            **{"amount": "Betrag", "account": "Sachkonto"},
        },
    ),
    (
        "Transaction date,Value date,Description,Withdrawals (SGD),Deposits (SGD),Category",
        "18/04/2018,18/04/2018,shop {i},{i}.66,,{k}",
        {
            **{"date": "Transaction date", "text": "Description", "account": "Category"},
            **{"out": "Withdrawals (SGD)", "in": "Deposits (SGD)"},
        },
    ),
    (
        '"Datum","Naam / Omschrijving","Rekening","Tegenrekening","Af Bij","Bedrag (EUR)",'
        '"Grootboek"',
        '"20240102","winkel {i}","NL01","NL{i}","{s}","{i},50","{k}"',
        {
            **{"date": "Datum", "text": "Naam / Omschrijving", "amount": "Bedrag (EUR)"},
            **{"sign": "Af Bij", "account": "Grootboek"},
        },
    ),
    (
        "Date,Libellé,Débit,Crédit,Solde,Catégorie",
        "02/01/2024,Achat {i},,{i}.50,{i}00.00,{k}",
        {
            **{"date": "Date", "text": "Libellé", "out": "Débit", "in": "Crédit"},
            "account": "Catégorie",
        },
    ),
    (
        "日付,摘要,金額,科目",
        "2024/01/{d},店 {i},-{i}00,{k}",
        {"date": "日付", "text": "摘要", "amount": "金額", "account": "科目"},
    ),
    (
        "Umsatz (ohne Soll/Haben-Kz);Soll/Haben-Kennzeichen;Sachkonto;Belegdatum;Buchungstext",
        "{i},50;{h};{k};{d}.03.2024;Tanken {i}",
        {
            **{"amount": "Umsatz (ohne Soll/Haben-Kz)", "sign": "Soll/Haben-Kennzeichen"},
            **{"account": "Sachkonto", "date": "Belegdatum", "text": "Buchungstext"},
        },
    ),
    (
        "Date,Description,Debit Amount,Credit Amount,Balance,Category\n,,EUR,,,",
        "{d}/01/2024,s{i},-{i}.20,,1.00,{k}",
        {
            **{"date": "Date", "text": "Description", "account": "Category"},
            **{"out": "Debit Amount", "in": "Credit Amount"},
        },
    ),
    (  # by what stands in them
        "A;B;C;D",
        "{d}.01.2024;shop number {i};-{i},50;{k}",
        {"date": "A", "text": "B", "amount": "C", "account": "D"},
    ),
    (
        "",
        "{d}.01.2024;shop number {i};-{i},50;{k}",
        {"date": "1", "text": "2", "amount": "3", "account": "4"},
    ),
    (
        "Date,Account,Payee,Memo,Amount,Category",
        "2024-01-02,Checking,shop {i},memo {i},-{i}.50,{k}",
        {"date": "Date", "text": "Payee+Memo", "amount": "Amount", "account": "Category"},
    ),
    (
        "BankEntryDate,Text,Sum,To account",
        "2024-01-02,shop {i},{i},{k}",
        {"text": "Text", "amount": "Sum", "account": "To account"},
    ),
]


@pytest.mark.parametrize(("header", "row", "columns"), GUESSES, ids=str)
def test_columns_are_guessed_by_their_names_and_what_stands_in_them(header, row, columns):
    rows = [
        row.format(
            i=i, d=10 + i, k=("6300", "7140 Travel")[i % 2], s=("Af", "Bij")[i % 2], h="SH"[i % 2]
        )
        for i in range(1, 19)
    ]
    found = table("\n".join(filter(None, [header, *rows])) + "\n")
    named = dict(part.split("=") for part in found.map.split(","))
    assert named == columns


def test_what_is_not_clear_is_asked_for_and_only_then_refused():
    content = "When;What;X;Y;Sum\n" + "".join(
        f"1.2.2024;shop {i};a{i % 3};b{i % 2};{i},50\n" for i in range(30)
    )
    with pytest.raises(files.Failed, match=r"say which is which, as --map account=COLUMN$"):
        table(content)
    asked = []

    def ask(field, names, rows):
        asked.append((field, names, rows[0]))
        return "4"

    assert table(content, ask=ask).map == "text=What,amount=Sum,account=Y,date=When"
    assert asked == [
        ("account", ["When", "What", "X", "Y", "Sum"], ["1.2.2024", "shop 0", "a0", "b0", "0,50"])
    ]
    assert table(content, booked=False).map == "text=What,amount=Sum,date=When"


def test_a_program_guesses_nothing(tmp_path):
    path = write_csv(tmp_path / "bank.csv", [{"Text": "a", "Amount": "1", "Account": "2"}])
    with pytest.raises(files.Failed, match="has no column CompanyId, BankEntryText"):
        list(files.read_rows(path))


# ---------------------------------------------------------------------------------- Kinds of files

CSV = "Date,Description,Amount,Category\n2024-01-0{},shop {},-1.50,F\n"


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_all_csv_files_of_a_zip_are_read_by_name(tmp_path):
    path = zipped(
        tmp_path / "bank.zip",
        **{"b.CSV": CSV.format(2, "b"), "a.csv": CSV.format(1, "a"), "c/d.txt": CSV.format(3, "c")},
        **{"__MACOSX/._a.csv": b"\0\1\2", ".hidden.csv": "x", "readme.md": "x"},
    )
    rows = list(files.read_rows(path, NAMES, "A"))
    assert [row["BankEntryText"] for row in rows] == ["shop a", "shop b", "shop c"]
    zipped(path, **{"a.csv": CSV.format(1, "a"), "b.csv": "When,What\n1,2\n"})
    with pytest.raises(files.Failed, match=r"bank.zip, b.csv has no column Descr"):
        list(files.read_rows(path, NAMES, "A"))
    with pytest.raises(files.Failed, match="there is no CSV file in"):
        list(files.read_rows(zipped(path, **{"a.pdf": "x"}), NAMES, "A"))


def workbook(path):
    """An Excel file with a preamble, a header and a row."""
    book = Workbook()
    for row in (
        ["My account"],
        ["Description", "Category", "Amount", "Date"],
        ["shop", "F", -12.5, datetime(2024, 1, 2)],
    ):
        book.active.append(row)
    book.create_sheet("empty")
    book.save(path)


MT940 = """:20:START
:25:12345678/0000000000
:28C:1/1
:60F:C240101EUR100,00
:61:2401020102D12,50N024NONREF
:86:005?00LASTSCHRIFT?20SVWZ+BILL?32SHOP ONE
:61:2401030103C1200,00N024NONREF
:86:005?00GUTSCHRIFT?20Sales
:62F:C240102EUR87,50
-
"""
OFX = """OFXHEADER:100
<OFX><STMTTRN><DTPOSTED>20240102120000<TRNAMT>-12.50<NAME>SHOP &amp; CO<MEMO>Bill</STMTTRN>
<STMTTRN>
<DTPOSTED>20240103
<TRNAMT>5,00
<NAME>Sales
</STMTTRN></OFX>
"""


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("bank.xlsx", workbook, [["shop", "-12.5", "2024-01-02"]]),
        (
            "bank.sta",
            MT940,
            [["SHOP ONE BILL", "-12.50", "2024-01-02"], ["Sales", "1200.00", "2024-01-03"]],
        ),
        (
            "bank.ofx",
            OFX.replace("5,00", "5.00"),
            [["SHOP & CO Bill", "-12.50", "2024-01-02"], ["Sales", "5.00", "2024-01-03"]],
        ),
    ],
)
def test_files_that_are_no_csv_are_read_to_suggest_accounts(tmp_path, name, content, read):
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_text(content)
    with files.open_file(path, company="A", booked=False, guess=True) as book:
        [found] = book.tables
        assert values(found, "BankEntryText", "BankEntryAmount", "BankEntryDate") == read
        out = io.StringIO()
        list(found.suggested(out, lambda samples: [["6300"]] * len(samples), ["account"]))
        rows = list(files.csv.reader(io.StringIO(out.getvalue())))
        assert [row[-1] for row in rows[-len(read) - 1 :]] == ["account", *["6300"] * len(read)]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<html><table><tr><td>Date</td></tr></table></html>", "a web page, whatever its name"),
        (b"\xef\xbb\xbf  <!DOCTYPE html>", "a web page"),
        (b"!Type:Bank\nD01/02/2024\nT-12.50\n^\n", "QIF"),
        (b'<?xml version="1.0"?><Document><BkToCstmrStmt/></Document>', "CAMT"),
        (b'<?xml version="1.0"?><a/>', "XML"),
        (b"%PDF-1.4", "a PDF"),
        (b'{"a": 1}', "JSON"),
        (b"\x1f\x8b\x08", "compressed, but no zip"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel file that cannot be read"),
        (b":20:START\n:61:nonsense\n", "MT940 that cannot be read"),
        (b'[{"a": 1}]', "JSON"),
    ],
)
def test_other_kinds_are_named_with_the_way_out(tmp_path, content, what):
    path = tmp_path / "bank.csv"
    path.write_bytes(content)
    with pytest.raises(files.Failed, match=rf"bank.csv is {what}.*: (export|save) it as CSV"):
        list(files.read_rows(path, NAMES, "A"))


def test_what_is_not_installed_is_said_in_one_sentence(tmp_path, monkeypatch):
    for name in ("chardet", "dateparser", "dateparser.date"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        files.Failed, match=r"a file that is not UTF-8 needs the package chardet: pip"
    ):
        table(CSV.format(1, "ä").encode("cp1252"), NAMES)
    with pytest.raises(
        files.Failed, match=r"a date such as 2 Mar 24 needs the package dateparser: pip"
    ):
        files.by_date([booking(BankEntryDate="2 Mar 24")])
    assert values(table(CSV.format(1, "a"), NAMES), "BankEntryText") == ["shop a"]


# ------------------------------------------------------------------------------------- Suggestions


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("Text,Sum\na,1\n", "Text,Sum,account\na,1,X\n"),
        ("Text,Sum,Account\na,1,Checking\n", "Text,Sum,Account,account 2\na,1,Checking,X\n"),
        ("Text,Sum\na,1,\nb,2\n", "Text,Sum,,account\na,1,,X\nb,2,,X\n"),
        ("Text,Sum,\na,1\nTotal\n", "Text,Sum,,account\na,1,,X\nTotal,,,\n"),
        ("sep=;\r\nText;Sum\r\na;1,5\r\n", "sep=;\r\nText;Sum;account\r\na;1,5;X\r\n"),
        ("My bank\n\nText,Sum\n a , 1 \n", "My bank\n\nText,Sum,account\n a , 1 ,X\n"),
        ('"Text","Sum"\n"a ""b""","1"\n', '"Text","Sum","account"\n"a ""b""","1","X"\n'),
        ('Text,Sum\n"a "b" c",1\n"d\ne",1', 'Text,Sum,account\n"a "b" c",1,X\n"d\ne",1,X\n'),
    ],
)
def test_suggestions_stand_behind_each_row_as_it_stands(content, written):
    found = table(content, {"text": "Text", "amount": "Sum"}, booked=False)
    out = io.StringIO()
    list(found.suggested(out, lambda samples: [["X"]] * len(samples), ["account"]))
    assert out.getvalue() == written


def test_suggestions_without_a_header_stand_behind_each_row():
    found = table("a;1,5\nb;2,5\n", {"text": "1", "amount": "2"}, booked=False)
    out = io.StringIO()
    list(found.suggested(out, lambda samples: [["X", "0.9"]] * len(samples), ["account", "c"]))
    assert out.getvalue() == "a;1,5;X;0.9\nb;2,5;X;0.9\n"


def test_no_cell_is_a_formula_whatever_separates_cells():
    """All short texts of what matters, read as a spreadsheet does with each separator."""
    for texts in itertools.product(["", *"'\" =-1x;\t\r\n"], repeat=4):
        text = "".join(texts)
        cell = files.guarded(text)
        assert files.unguarded(cell) == text
        file = io.StringIO(newline="")
        csv.writer(file, quoting=csv.QUOTE_ALL).writerow(["x", cell])
        for separator in ",;\t":
            lines = file.getvalue().splitlines(keepends=True)
            for shown in itertools.chain(*csv.reader(lines, delimiter=separator)):
                assert not re.match('["\\s]*[=-]', shown) or re.fullmatch("-1+", shown)


def test_what_was_guarded_is_read_as_it_was():
    texts = ["=1+1", "'=x", "x;-y", "'s", "+47 12"]
    rows = io.StringIO()
    for text in texts:
        row = ["2024-01-01", text, "-12.50", text]
        csv.writer(rows, quoting=csv.QUOTE_ALL).writerow(map(files.guarded, row))
    found = table(f"Date,Description,Amount,Category\n{rows.getvalue()}", NAMES)
    read = values(found, "BankEntryText", "BankEntryAmount", "AccountNumber")
    assert read == [[text, "-12.50", text] for text in texts]
