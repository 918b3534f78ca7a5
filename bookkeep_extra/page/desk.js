// The page's script: asks the service for its figures every two seconds, lists bookings to review,
// and sends what a person confirms or changes.
//
// Its sections: Elements, Service, Completion, Suggestions, Bookings, Review, Changes, Keys,
// Company, CSV, Curve, Coverage, Refresh. The last one starts it.

// --------------------------------------------------------------------------------------- Elements

const $ = (id) => document.getElementById(id);
const on = (id, event, handler) => $(id).addEventListener(event, handler);

const count = (number) => number.toLocaleString("en");
const score = (share) => share?.toFixed(3) ?? "–";
const percent = (share, digits = 1) => (share == null ? "–" : `${(100 * share).toFixed(digits)}%`);
const sureness = (confidence) =>
  confidence == null ? "not measured yet" : `${percent(confidence)} sure`;
const signed = (number) => `${number < 0 ? "−" : "+"}${Math.abs(number).toFixed(2)}`;

// What the service says gets into the page only as text, by `setText` and `append`.
function setText(node, text) {
  // A status that stays the same is not read aloud again.
  if (node.textContent !== text) node.textContent = text;
}

function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function svgElement(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const span = (className, ...children) => element("span", { className }, ...children);
const muted = (...children) => span("muted", ...children);
const row = (...cells) => element("tr", { role: "row" }, ...cells);
const cell = (...children) => element("td", { role: "cell" }, ...children);
const numberCell = (...children) =>
  element("td", { role: "cell", className: "number" }, ...children);

// A text that somebody sent, cut: the browser takes seconds to lay out 10,000 characters. <bdi>
// keeps one that is written from right to left from turning round what stands beside it.
function userText(text, most = 150) {
  return element("bdi", { title: text }, text.length > most ? `${text.slice(0, most)}…` : text);
}

const shownRows = new Map(); // id of a table -> its items, as JSON

// Fills a table, unless it shows these items already: what one reads in it stays where it is.
function fillTable(id, items, toRow) {
  const state = JSON.stringify(items);
  if (shownRows.get(id) !== state) $(id).tBodies[0].replaceChildren(...items.map(toRow));
  shownRows.set(id, state);
}

// ---------------------------------------------------------------------------------------- Service

const TIMEOUT = 10_000; // milliseconds

class ServiceError extends Error {} // its cause is the HTTP status, 0 without an answer

const asQuery = (parameters) =>
  new URLSearchParams(Object.entries(parameters).filter(([, value]) => value)).toString();

// What the service answers. Throws ServiceError.
async function ask(path, { body, method = body ? "POST" : "GET", timeout = TIMEOUT } = {}) {
  const token = sessionStorage.getItem("token");
  const headers = {
    ...(token && { Authorization: `Bearer ${token}` }),
    ...(body && { "Content-Type": "application/json" }),
  };
  const signal = AbortSignal.timeout(timeout);
  let response, answer;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
    answer = await response.json();
  } catch ({ name }) {
    if (name === "SyntaxError") {
      // A proxy's own answer is no JSON.
      const { status } = response;
      throw new ServiceError(`something answered ${status}, not the service`, { cause: status });
    }
    const isLate = name === "TimeoutError";
    const reason = isLate ? "the service took too long to answer" : "the service is not reachable";
    throw new ServiceError(reason, { cause: 0 });
  }
  if (response.status === 401) askForToken(token);
  if (!response.ok) throw new ServiceError(answer.error, { cause: response.status });
  return answer;
}

function asSentence(error) {
  if (!(error instanceof ServiceError)) throw error;
  return `${error.message[0].toUpperCase()}${error.message.slice(1)}.`;
}

// Says `doing` until the action is done, and then what it returned, or why it failed.
async function sayOutcome(node, doing, action) {
  setText(node, doing);
  setText(node, await action().catch(asSentence));
}

function askForToken(refused) {
  // A newer token may have been entered while this request was on its way.
  if (sessionStorage.getItem("token") !== refused) return;
  sessionStorage.removeItem("token");
  const text = refused
    ? "The service refused this token. Enter another one."
    : "This service answers only those who send its token.";
  setText($("access-status"), text);
  $("access").hidden = false;
  if ($("report").hidden) $("token").focus();
}

on("access", "submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  $("token").value = "";
  setText($("access-status"), "Asking the service.");
  refresh();
});

// ------------------------------------------------------------------------------------- Completion

// A field with a list of what could be meant, as the ARIA pattern "combobox" has it. The options:
// - find(text): what fits, best first, each an array: the choice, and what is shown of it
// - choose(choice), after Enter or a click
// - reset(), after Escape
// - leave(text), once the focus goes
class Completion {
  constructor(id, ariaLabel, { find, choose, reset, leave = () => {} }) {
    Object.assign(this, { field: $(id), find, choose, reset });
    this.list = element("ul", { id: `${id}-list`, role: "listbox", ariaLabel });
    this.list.addEventListener("pointerdown", (event) => event.preventDefault()); // keeps the focus
    this.field.after(this.list);
    this.field.setAttribute("aria-controls", this.list.id);
    Object.assign(this.field, { role: "combobox", ariaAutoComplete: "list" });
    on(id, "input", () => this.open());
    on(id, "focus", () => {
      this.field.select();
      this.open();
    });
    on(id, "blur", () => {
      this.show([]);
      leave(this.field.value);
    });
    on(id, "keydown", (event) => this.press(event));
    this.show([]);
  }

  open(at = 0) {
    this.show(this.find(this.field.value), at);
  }

  show(choices, at = 0) {
    this.at = Math.max(0, Math.min(at, choices.length - 1));
    this.choice = choices[this.at]?.[0];
    const options = choices.map(([choice, ...shown], place) => {
      const ariaSelected = String(place === this.at);
      const id = `${this.list.id}-${place}`;
      const onclick = () => this.take(choice);
      return element("li", { role: "option", id, ariaSelected, onclick }, ...shown);
    });
    this.list.replaceChildren(...options);
    this.list.hidden = !options.length;
    this.field.ariaExpanded = String(!this.list.hidden);
    this.field.setAttribute("aria-activedescendant", options[this.at]?.id ?? "");
    options[this.at]?.scrollIntoView({ block: "nearest" });
  }

  take(choice) {
    this.show([]);
    this.choose(choice);
  }

  press(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) this.open(this.list.hidden ? 0 : this.at + step);
    else if (event.key === "Enter") this.take(this.choice ?? this.field.value);
    else if (event.key === "Escape") {
      this.show([]);
      this.reset();
    } else return;
    event.preventDefault();
  }
}

// Items of which a word equals the text, then those with one that begins with it, then those with
// one that contains it; 50 at most. `wordsOf(item)` are its words.
function fitting(items, text, wordsOf) {
  const wanted = text.trim().toLowerCase();
  const rank = (word) => {
    const at = word.toLowerCase().indexOf(wanted);
    if (at < 0) return 3;
    if (at > 0) return 2;
    return word.length > wanted.length ? 1 : 0;
  };
  const ranked = items.map((item) => [Math.min(...wordsOf(item).map(rank)), item]);
  const found = ranked.filter(([place]) => place < 3).sort(([a], [b]) => a - b);
  return found.slice(0, 50).map(([, item]) => item);
}

// ------------------------------------------------------------------------------------ Suggestions

const CHECK = 16; // bookings that a check stands for
const REASONS = 13; // shown for one suggestion: a long text has hundreds
const latestOf = new WeakMap(); // a box -> the sample that it was last asked for

// Shows in the box what the service suggests for the sample, and why.
async function suggest(box, sample) {
  latestOf.set(box, sample);
  let suggestions = [];
  let verdict;
  let evidence = [];
  try {
    const { record, ...answer } = await ask("suggest?top=5", { body: sample });
    const [first] = answer.suggestions;
    const isNew = record.known === "nothing of the company";
    if (isNew && first.over && first.reasons.every(({ kind }) => kind === "amount")) {
      verdict = ["Nothing is known of this company yet, nor of these words."];
    } else {
      suggestions = answer.suggestions;
      verdict = [
        isNew ? "Nothing is known of this company yet. By what others book, most" : "Most",
        " likely ",
        element("b", {}, ...accountText(sample.CompanyId, first.account)),
        first.confidence == null
          ? "; how often such suggestions are right is not measured yet."
          : `, with ${percent(first.confidence)} confidence.`,
      ];
      evidence = evidenceText(sample.CompanyId, first.account, record, isNew);
    }
  } catch (error) {
    verdict = [span("error", asSentence(error))];
  }
  if (latestOf.get(box) !== sample) return; // it was asked for another one meanwhile
  const [verdictLine, evidenceLine, legend, ranking] = box.children;
  verdictLine.replaceChildren(...verdict);
  evidenceLine.replaceChildren(...evidence);
  ranking.replaceChildren(
    ...suggestions.map((each, place) => suggestionItem(each, place, sample.CompanyId)),
  );
  legend.hidden = suggestions.length < 2;
}

// What a confidence rests on: the company's own suggestions of that account, and all companies'.
function evidenceText(company, account, { known, own, all }, isNew) {
  const alike = "with about as much evidence";
  const companys = element("span", {}, userText(company, 40), "’s own");
  const ofAccount = ["of ", userText(account, 40), ` ${alike}`];
  const ofAny = `all companies’ suggestions of any account ${alike} and ${known} known`;
  const ofAll = all.suggestions
    ? `Of ${ofAny}, ${count(all.right)} of ${count(all.suggestions)} were right, ` +
      "where n of one company count as √n."
    : `There are none yet of ${ofAny}.`;
  return [...(isNew ? [] : [...tally(companys, ofAccount, own), " "]), ofAll];
}

function tally(whose, which, { suggestions, right }) {
  if (suggestions === 0) return ["There are none yet of ", whose, " suggestions ", ...which, "."];
  if (suggestions === 1) {
    const verdict = right ? "right" : "wrong";
    return ["The only one of ", whose, " suggestions ", ...which, ` was ${verdict}.`];
  }
  const end = `, ${right ? count(right) : "none"} ${right === 1 ? "was" : "were"} right.`;
  return ["Of ", whose, ` ${count(suggestions)} suggestions `, ...which, end];
}

function suggestionItem({ account, confidence, over, margin, prior, reasons }, place, company) {
  const bar = span("bar", span(""));
  bar.firstChild.style.width = percent(confidence ?? 0);
  const summary = element(
    "summary",
    {},
    span("clip", ...accountText(company, account)),
    bar,
    span("number", percent(confidence)),
  );
  const why = over
    ? reasonsTable(over, margin, prior, reasons)
    : "There is no other account yet to compare it with.";
  const details = element("details", { open: place === 0 }, summary, element("div", {}, why));
  return element("li", {}, details);
}

// The heaviest reasons in the order in which the service gives them, and the sum of all others.
function reasonsTable(over, margin, prior, reasons) {
  const bySize = reasons.toSorted((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  const others = new Set(bySize.slice(REASONS));
  const shown = [
    { token: "how often each is booked", kind: "", weight: prior },
    ...reasons.filter((reason) => !others.has(reason)),
  ];
  if (others.size) {
    const weight = [...others].reduce((sum, reason) => sum + reason.weight, 0);
    shown.push({ token: `${count(others.size)} more`, kind: "", weight });
  }
  const most = Math.max(...shown.map(({ weight }) => Math.abs(weight)));
  const rows = shown.map(({ token, kind, weight }) =>
    row(
      cell(span("clip", userText(token, 40), " ", muted(kind))),
      cell(weightBar(weight / most)),
      numberCell(signed(weight)),
    ),
  );
  const caption = element("caption", {}, "For it, and against ", userText(over, 40));
  const sum = row(cell("Together"), cell(), numberCell(signed(margin)));
  const body = element("tbody", {}, ...rows, sum);
  return element("table", { className: "reasons" }, caption, body);
}

// A bar from the middle to the right, or, for a share below zero, to the left.
function weightBar(share) {
  const bar = span(share < 0 ? "against" : "");
  bar.style.left = percent(0.5 + Math.min(0, share) / 2);
  bar.style.width = percent(Math.abs(share) / 2);
  return span("bar zero", bar);
}

on("try", "submit", (event) => {
  event.preventDefault();
  const filled = [...new FormData($("try"))].filter(([, value]) => value);
  suggest($("suggestions"), Object.fromEntries(filled));
});

// A field for each key of the context; what is typed in it stays.
function showContext(keys) {
  if (String(keys) === String(context)) return;
  context = keys;
  $("try-context").replaceChildren(
    ...keys.map((name) =>
      element("label", {}, userText(name, 40), element("input", { name, autocomplete: "off" })),
    ),
  );
}

// --------------------------------------------------------------------------------------- Bookings

let health; // of the service, as last heard of
let target = "AccountNumber"; // the key that is booked
let context = []; // keys beside the text that count, too
let ownCompany = null; // that the token is for, null if it is for all
let shownCompany = ""; // all companies, if it is empty
const bookings = new Map(); // seq -> the booking, as last heard of
const companies = new Set(); // that were heard of
const accountNames = new Map(); // [company, account] as JSON -> as the company calls it

const accountName = (company, account) => accountNames.get(JSON.stringify([company, account]));

function accountText(company, account) {
  const name = accountName(company, account);
  return [span("one-line", userText(account, 40)), ...(name ? [" ", muted(userText(name))] : [])];
}

const dayOf = ({ BankEntryDate: date }) => date?.slice(0, 10) || "–";

// Takes note of how a booking stands now.
function note(booking) {
  const { seq, sample, account, reviewed, predicted } = booking;
  const before = bookings.get(seq);
  bookings.set(seq, booking);
  companies.add(sample.CompanyId);
  accountNames.set(JSON.stringify([sample.CompanyId, account]), booking.name);
  accountNames.set(JSON.stringify([sample.CompanyId, predicted]), booking.predicted_name);
  if (before && (before.account !== account || before.reviewed !== reviewed)) redraw(seq);
  return booking;
}

// All bookings, the newest first: answers of the service, each with some bookings.
async function* pages(filters) {
  let before;
  do {
    const page = await ask(`bookings?${asQuery({ ...filters, limit: 500, before })}`);
    yield page;
    before = page.next;
  } while (before);
}

// The last 10,000 bookings, for what is known of them only approximately.
async function* recentPages(filters) {
  let left = 20;
  for await (const page of pages(filters)) {
    page.bookings.forEach(note);
    yield page;
    left -= 1;
    if (!left) return;
  }
}

// ----------------------------------------------------------------------------------------- Review

const FIRST = 10; // bookings of the list
const MORE = 25;

// What the list shows: {filters, phases, seqs, before, samples, ...}. The service is asked for one
// phase after the other (reviewed "no", then "yes"; or "wrong"); `phases` are not at their end yet,
// `before` says where the next page starts, `samples` how many bookings there were at its start.
// It is `used` once somebody works with it.
let queue;
let selected; // a seq
const doubts = new Map(); // seq -> what is said against a booking of the list, if it looks wrong

const HEADINGS = {
  no: "Booked unseen, not looked at yet",
  yes: "Booked or seen by a person",
  wrong: "Looks wrong, the most probable first",
};

const changeOf = (seq) => session.findLast((change) => change.seq === seq);
const rowOf = (seq) => $("list").querySelector(`[data-seq="${seq}"]`);
const buttonOf = (seq) => rowOf(seq)?.querySelector("button");

function say(text, isError = false) {
  setText($("review-status"), text);
  $("review-status").classList.toggle("error", isError);
}

// Why a booking looks wrong, in words.
function doubtText({ sample, account }, { likely, probability, like, alike, ...on }) {
  const rather = accountText(sample.CompanyId, likely);
  const words = ["It looks wrong, with ", percent(probability), ". Likelier is ", ...rather, ": "];
  if (!like) return [...words, "no other booking is like it, but its words are that account’s."];
  const others = `${count(alike)} other booking${alike === 1 ? "" : "s"} with the same ${like}`;
  words.push(`of ${others}, ${count(on.on_likely)} on `, userText(likely, 40));
  return [...words, `, ${count(on.on_account)} on `, userText(account, 40), "."];
}

// What was done with a booking, to stand behind its account.
function statusText({ seq, account, reviewed, corrected, booked_by: by }) {
  const change = changeOf(seq);
  const from = (change ?? corrected)?.from;
  let words;
  if (!reviewed) words = ["unseen"];
  else if (from && from !== account) words = ["was ", userText(from, 40)];
  else if (from) words = ["confirmed"];
  else if (by === "check") words = ["checked"];
  else return [];
  return [" ", span(change ? "good" : "muted", change ? "✓ " : "· ", ...words)];
}

function bookingRow(booking) {
  const { seq, sample, account, predicted, confidence } = booking;
  const isChanged = Boolean(changeOf(seq));
  const doubt = doubts.get(seq);
  let suggested = ["–"];
  if (isChanged) suggested = statusText(booking);
  else if (doubt) suggested = accountText(sample.CompanyId, doubt.likely);
  else if (predicted === account) suggested = [muted("the same")];
  else if (predicted) suggested = accountText(sample.CompanyId, predicted);
  const button = element(
    "button",
    { type: "button", onfocus: () => select(seq) },
    span("clip", userText(sample.BankEntryText)),
  );
  button.setAttribute("aria-describedby", "when facts");
  const made = row(
    cell(dayOf(sample)),
    cell(span("clip", userText(sample.CompanyId))),
    cell(button),
    numberCell(span("clip", userText(sample.BankEntryAmount))),
    cell(span("clip", ...accountText(sample.CompanyId, account))),
    cell(span("clip", ...suggested)),
    numberCell(percent(doubt?.probability ?? confidence)),
  );
  made.dataset.seq = seq;
  made.classList.toggle("changed", isChanged);
  made.onclick = () => button.focus();
  markSelected(made, seq === selected);
  return made;
}

// The tab key reaches one row of the list, the selected one; the arrow keys go from there.
function markSelected(listRow, isSelected) {
  listRow.ariaCurrent = isSelected ? "true" : null;
  listRow.querySelector("button").tabIndex = isSelected ? 0 : -1;
}

function redraw(seq) {
  const focused = buttonOf(seq) === document.activeElement;
  rowOf(seq)?.replaceWith(bookingRow(bookings.get(seq)));
  if (focused) buttonOf(seq)?.focus();
  if (seq === selected) showSelected();
}

function select(seq) {
  if (seq === selected) return;
  for (const each of [selected, seq].filter(rowOf)) markSelected(rowOf(each), each === seq);
  selected = seq;
  showChooser(false);
  showSelected();
  explain();
}

function showSelected() {
  const booking = bookings.get(selected);
  for (const id of ["confirm", "change", "why"]) $(id).disabled = !booking;
  $("panel").hidden = !booking && !session.length;
  if (!booking) return;
  const { sample, account, predicted, confidence } = booking;
  const whose = sample.CompanyId;
  const href = `#${asQuery({ company: whose })}`;
  $("when").replaceChildren(element("a", { href }, userText(whose, 60)), ` · ${dayOf(sample)}`);
  $("text").replaceChildren(userText(sample.BankEntryText, 400));
  $("amount").replaceChildren(userText(sample.BankEntryAmount));
  for (const node of $("facts").querySelectorAll(".context")) node.remove();
  const said = context.filter((key) => Object.hasOwn(sample, key) && sample[key]);
  const className = "context";
  const asTerms = (key) => [
    element("dt", { className }, userText(key, 40)),
    element("dd", { className }, userText(sample[key])),
  ];
  $("amount").after(...said.flatMap(asTerms));
  $("booked").replaceChildren(...accountText(whose, account), ...statusText(booking));
  const doubt = doubts.get(selected);
  $("doubt").hidden = !doubt;
  if (doubt) $("doubt").replaceChildren(...doubtText(booking, doubt));
  if (predicted === null) return setText($("suggested"), "nothing");
  const suggested = predicted === account ? ["the same"] : accountText(whose, predicted);
  $("suggested").replaceChildren(...suggested, `, ${sureness(confidence)}`);
}

// Says why the selected booking was suggested, as long as that is wanted.
function explain() {
  const booking = $("why").ariaExpanded === "true" && bookings.get(selected);
  $("explanation").hidden = !booking;
  if (booking) suggest($("explanation"), booking.sample);
}

function loadQueue() {
  const filters = { company: shownCompany, below: $("below").value, order: $("order").value };
  const phases = $("reviewed").value.split(" ");
  const isOfWrong = phases[0] === "wrong";
  for (const id of ["below", "order"]) $(id).disabled = isOfWrong;
  setText($("instead"), isOfWrong ? "Likelier" : "Suggested");
  setText($("how-sure"), isOfWrong ? "Wrong" : "Confidence");
  if (isOfWrong && !doubts.size) {
    // It takes a second or two: meanwhile other bookings must not stand there.
    $("list").hidden = true;
    setText($("empty"), "Looking for what looks wrong …");
  }
  doubts.clear();
  queue = { filters, phases, seqs: [], samples: health.samples };
  return loadMore(FIRST);
}

// Adds that many bookings to the list, if there are as many.
async function loadMore(missing = MORE) {
  const asked = queue;
  const isFirst = !asked.seqs.length;
  const rows = [];
  asked.loading = true;
  asked.error = null;
  try {
    while (asked.phases.length && missing > 0) {
      const [phase] = asked.phases;
      const { filters, before } = asked;
      const { company } = filters;
      const page = await (phase === "wrong"
        ? ask(`suspects?${asQuery({ company, limit: missing, before })}`)
        : ask(`bookings?${asQuery({ ...filters, reviewed: phase, limit: missing, before })}`));
      if (asked !== queue) return; // the filters are others by now
      asked.before = page.next;
      if (!page.next) asked.phases.shift();
      const isNew = ({ seq }) => !changeOf(seq) && !asked.seqs.includes(seq);
      for (const each of page.suspects ?? []) doubts.set(each.seq, each);
      const found = (page.bookings ?? page.suspects).map(note).filter(isNew);
      if (found.length && asked.heading !== phase) {
        asked.heading = phase;
        rows.push(headingRow(phase, filters.company ? 6 : 7));
      }
      asked.seqs.push(...found.map(({ seq }) => seq));
      rows.push(...found.map(bookingRow));
      missing -= found.length;
    }
  } catch (error) {
    if (asked !== queue) return;
    asked.error = error;
    if (!isFirst) say(asSentence(error), true);
  } finally {
    asked.loading = false;
  }
  const isEmpty = !asked.seqs.length;
  if (isFirst) $("list").tBodies[0].replaceChildren();
  $("list").tBodies[0].append(...rows);
  $("list").classList.toggle("one-company", Boolean(asked.filters.company));
  $("list").hidden = isEmpty;
  $("more").hidden = isEmpty || !asked.phases.length;
  const nothing =
    $("reviewed").value === "wrong" ? "Nothing looks wrong." : "There is nothing to review.";
  const why = asked.error ? asSentence(asked.error) : nothing;
  setText($("empty"), isEmpty ? why : "");
  if (isFirst && !asked.seqs.includes(selected)) select(asked.seqs[0]);
}

function headingRow(phase, colSpan) {
  const heading = { scope: "rowgroup", role: "rowheader", colSpan };
  return row(element("th", heading, HEADINGS[phase]));
}

// Loads the list anew once there are other bookings, unless somebody works with it.
function keepUp() {
  const failed = queue?.error && queue.error.cause !== 404;
  const isStale = !queue || failed || queue.samples !== health.samples;
  const isUsed = queue?.seqs.length && (queue.used || $("review").matches(":hover, :focus-within"));
  $("reload").hidden = !isStale || !isUsed;
  if (isStale && !isUsed && !queue?.loading && health.samples) loadQueue();
}

// Goes to the next booking of the list, or with step -1 to the one before, that is not skipped. The
// focus goes along, unless it is on one of the buttons beside. Returns what there is to say.
async function move(step, isSkipped = () => false) {
  queue.used = true;
  let at = queue.seqs.indexOf(selected) + step;
  while (isSkipped(queue.seqs[at])) at += step;
  if (at >= queue.seqs.length && queue.phases.length && !queue.loading) await loadMore();
  const seq = queue.seqs[at];
  if (seq === undefined) return ` That was the ${step > 0 ? "last" : "first"} one.`;
  if ($("buttons").contains(document.activeElement)) select(seq);
  else buttonOf(seq).focus();
  rowOf(seq).scrollIntoView({ block: "nearest" });
  return "";
}

// ---------------------------------------------------------------------------------------- Changes

// What was confirmed or changed in this tab, the oldest first, each with {seq, from, to, wasUnseen,
// company, text}. It is confirmed if `from` and `to` are the same account.
let session = JSON.parse(sessionStorage.getItem("session") ?? "[]");
let isStoring = false;

// Books a booking to an account, unless one is being stored. First looks how it stands now, and
// stops if `objection` to that is not empty; `done` returns what to say.
async function store(seq, account, objection, done) {
  if (isStoring || seq === undefined) return;
  isStoring = true;
  queue.used = true;
  const slow = setTimeout(() => say("Storing …"), 400);
  try {
    const now = note(await ask(`bookings/${seq}`));
    if (objection(now)) return say(`${objection(now)} Nothing was changed.`, true);
    const { before } = await ask("correct", { body: { seq, [target]: account } });
    const { CompanyId } = now.sample;
    summaries.delete(CompanyId);
    note({ ...now, account, name: accountName(CompanyId, account) ?? null, reviewed: true });
    const words = done(now, before);
    redraw(seq);
    say(words + (changeOf(seq) ? await move(1, changeOf) : ""));
  } catch (error) {
    say(asSentence(error), true);
    if (error.cause === 404) loadQueue(); // it was forgotten
  } finally {
    clearTimeout(slow);
    isStoring = false;
  }
}

// Books the selected booking to an account, perhaps the one that it is booked to.
function bookTo(to) {
  const { seq, account, reviewed } = bookings.get(selected);
  const objection = (now) => {
    if (now.account !== account) return `Meanwhile it was booked to ${now.account}.`;
    return now.reviewed !== reviewed ? "Meanwhile it was confirmed." : "";
  };
  return store(seq, to, objection, ({ sample }, from) => {
    const text = sample.BankEntryText.slice(0, 150);
    const change = { seq, from, to, wasUnseen: !reviewed, company: sample.CompanyId, text };
    keepSession([...session, change]);
    return from === to ? `Confirmed ${to}.` : `Booked to ${to}, no longer to ${from}.`;
  });
}

function takeBack(change) {
  const { seq, from, to, wasUnseen } = change;
  const objection = (now) =>
    now.account === to ? "" : `Meanwhile it was booked to ${now.account}.`;
  return store(seq, from, objection, () => {
    keepSession(session.filter((each) => each !== change));
    if ($("list").contains(document.activeElement)) buttonOf(seq)?.focus();
    select(seq);
    if (from !== to) return `Back to ${from}.`;
    return wasUnseen
      ? `Back on the desk, but learned as ${to} until it is booked to another account.`
      : "Back on the desk, but it stays confirmed and looks wrong no more.";
  });
}

function keepSession(changes) {
  session = changes;
  sessionStorage.setItem("session", JSON.stringify(session));
  const confirmed = session.filter(({ from, to }) => from === to).length;
  const changed = session.length - confirmed;
  const [summary, list] = $("session").children;
  $("session").hidden = !session.length;
  $("undo").disabled = !session.length;
  setText(summary, `This session: ${count(confirmed)} confirmed, ${count(changed)} changed`);
  list.replaceChildren(...session.slice(-LATEST).reverse().map(changeItem));
}

function changeItem(change) {
  const { from, to, text } = change;
  const what =
    from === to ? ["confirmed ", userText(to, 40)] : [userText(from, 40), " → ", userText(to, 40)];
  const undo = { type: "button", onclick: () => takeBack(change), ariaLabel: `Undo: ${text}` };
  return element(
    "li",
    {},
    span("", span("clip", userText(text)), muted(...what)),
    element("button", undo, "Undo"),
  );
}

function showChooser(isOpen) {
  $("chooser").hidden = !isOpen;
  $("change").ariaExpanded = String(isOpen);
}

function leaveChooser() {
  showChooser(false);
  (buttonOf(selected) ?? $("change")).focus();
}

// Chooses among the suggested account, the present one, and all others of the company.
const chooser = new Completion("account", "Accounts", {
  find(text) {
    const { sample, account, predicted, confidence } = bookings.get(selected);
    const company = sample.CompanyId;
    const { accounts } = summaryOf(company);
    const byTimes = [...accounts.keys()].sort(
      (a, b) => accounts.get(b).times - accounts.get(a).times,
    );
    const likely = doubts.get(selected)?.likely ?? predicted ?? account;
    const all = [...new Set([likely, predicted ?? account, account, ...byTimes])];
    const found = fitting(all, text, (each) => [each, accountName(company, each) ?? ""]);
    const choices = found.map((each) => {
      let hint;
      if (each === account) hint = "now";
      else if (each === predicted) hint = sureness(confidence);
      else hint = count(accounts.get(each)?.times ?? 0);
      return [each, span("", ...accountText(company, each)), muted(hint)];
    });
    const typed = text.trim();
    if (typed && !all.includes(typed)) choices.push([typed, userText(typed), muted("new here")]);
    return choices;
  },
  choose(account) {
    leaveChooser();
    if (account) bookTo(account);
  },
  reset: leaveChooser,
});

async function openChooser() {
  if (!$("chooser").hidden) return leaveChooser();
  showChooser(true);
  $("account").value = "";
  $("account").focus();
  await summaryOf(bookings.get(selected).sample.CompanyId).read;
  if (document.activeElement === $("account")) chooser.open();
}

on("confirm", "click", () => bookTo(bookings.get(selected).account));
on("change", "click", openChooser);
on("why", "click", () => {
  $("why").ariaExpanded = String($("why").ariaExpanded !== "true");
  explain();
});
on("undo", "click", () => takeBack(session.at(-1)));
on("previous", "click", async () => say(await move(-1)));
on("next", "click", async () => say(await move(1)));
on("more", "click", () => {
  queue.used = true;
  loadMore();
});
on("reload", "click", loadQueue);
for (const id of ["reviewed", "below", "order"]) on(id, "change", loadQueue);

// ------------------------------------------------------------------------------------------- Keys

const KEYS = {
  c: "confirm",
  a: "change",
  w: "why",
  u: "undo",
  k: "previous",
  j: "next",
  "/": "company",
  "?": "help",
};

document.addEventListener("keydown", (event) => {
  const { key, target, repeat } = event;
  const arrow = target.closest("#list") && { ArrowUp: "previous", ArrowDown: "next" }[key];
  const letter = $("keys-on").checked && Object.hasOwn(KEYS, key) && KEYS[key];
  const id = arrow || letter;
  const isElsewhere = target.closest("input, select, dialog, .part") || $("report").hidden;
  if (!id || $(id).hidden || isElsewhere || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (id === "company") $(id).focus();
  else if (!repeat || id === "previous" || id === "next") $(id).click();
});

on("help", "click", () => $("keys").showModal());
$("keys-on").checked = localStorage.getItem("keys") !== "off";
on("keys-on", "change", () => localStorage.setItem("keys", $("keys-on").checked ? "on" : "off"));

document.addEventListener("click", ({ target }) => {
  if (target.closest("[data-close]")) target.closest("dialog").close();
});

// ---------------------------------------------------------------------------------------- Company

const LATEST = 12; // bookings of the company, or changes of the session
const REREAD = 10_000; // milliseconds after which its bookings are asked for again
const summaries = new Map(); // company -> what its bookings say

// What a company's recent bookings say: how often each account was booked, and on which day last;
// how many bookings there are; the latest. It fills up until the promise `read` is done.
function summaryOf(company) {
  if (summaries.has(company)) return summaries.get(company);
  const summary = { accounts: new Map(), bookings: 0, latest: [] };
  const read = async () => {
    for await (const page of recentPages({ company })) {
      for (const { account, sample } of page.bookings) {
        const { times = 0, last = dayOf(sample) } = summary.accounts.get(account) ?? {};
        summary.accounts.set(account, { times: times + 1, last });
      }
      summary.bookings += page.bookings.length;
      summary.latest.push(...page.bookings.slice(0, LATEST - summary.latest.length));
      summary.next = page.next;
    }
  };
  summary.read = read().catch((error) => {
    summaries.delete(company);
    summary.error = error;
  });
  summaries.set(company, summary);
  return summary;
}

let companyLines; // of the log when the company was last shown
let companyTime = 0; // when that was

async function showCompany() {
  companyLines = health.lines;
  companyTime = Date.now();
  const company = shownCompany;
  if (!company) return;
  summaries.delete(company);
  const summary = summaryOf(company);
  const report = await ask(`report/1000?${asQuery({ company })}`).catch(() => null);
  await summary.read;
  if (company !== shownCompany) return; // another one was chosen meanwhile
  $("company-view").hidden = Boolean(summary.error);
  if (summary.error) return;

  $("company-title").replaceChildren(userText(company, 60));
  const figures = [["Bookings", count(summary.bookings), summary.next ? "the last ones" : ""]];
  figures.push(...reportFigures(report));
  const asTerms = ([what, figure, more]) => [
    element("dt", {}, what),
    element("dd", {}, figure, " ", muted(more)),
  ];
  $("company-figures").replaceChildren(...figures.flatMap(asTerms));

  const byTimes = [...summary.accounts].sort(([, a], [, b]) => b.times - a.times);
  const accounts = byTimes.map(([account, { times, last }]) => {
    return { account, name: accountName(company, account), times, last };
  });
  fillTable("company-accounts", accounts, ({ account, times, last }) =>
    row(
      cell(span("clip", ...accountText(company, account))),
      numberCell(count(times)),
      cell(span("one-line", last)),
    ),
  );
  fillTable("company-latest", summary.latest, ({ sample, account }) =>
    row(
      cell(span("one-line", dayOf(sample))),
      cell(span("clip", userText(sample.BankEntryText))),
      numberCell(userText(sample.BankEntryAmount, 40)),
      cell(span("clip", ...accountText(company, account))),
    ),
  );
}

// Terms of the list of figures: what it is, the figure, and more of it.
function reportFigures(report) {
  if (!report) return [["Suggestions", "–", "none that a person has seen yet"]];
  const { support, accuracy, precision, recall, confidence } = report;
  const right = `Right, of the last ${count(support)} suggestions`;
  const levels = confidence.filter((level) => [0.9, 0.95].includes(level.at_least));
  return [
    [right, percent(accuracy), `precision ${score(precision)}, recall ${score(recall)}`],
    ...levels.map(({ at_least: from, share, accuracy, error }) => [
      `Could be booked unseen from ${percent(from, 0)} confidence on`,
      percent(share),
      accuracy === null ? "" : `${percent(accuracy)} ± ${percent(error)} of them right`,
    ]),
  ];
}

const goTo = (name) => {
  location.hash = asQuery({ company: name });
  follow();
};

// Shows the company that the token is for, or else the one that the address names.
function follow() {
  const name = ownCompany ?? new URLSearchParams(location.hash.slice(1)).get("company") ?? "";
  $("company").value = name;
  if (name === shownCompany) return;
  shownCompany = name;
  $("forgetting").close();
  $("company-view").hidden = true;
  setText($("company-status"), "");
  if (!health?.samples) return;
  loadQueue();
  showCompany();
  refresh();
}

addEventListener("hashchange", follow);
on("all-companies", "click", () => goTo(""));

let isSearched = false; // for the names of companies, in the last bookings

async function searchCompanies() {
  if (isSearched) return;
  isSearched = true;
  try {
    for await (const _ of recentPages({})) {
      if (document.activeElement === $("company")) finder.open(finder.at);
      if (companies.size >= health.companies) return;
    }
  } catch {
    isSearched = false;
  }
}

const finder = new Completion("company", "Companies", {
  find(text) {
    searchCompanies();
    const found = fitting([...companies].sort(), text, (each) => [each]);
    const choices = found.map((each) => [each, userText(each)]);
    if (!text) choices.unshift(["", "all companies"]);
    else if (!companies.has(text)) choices.push([text, userText(text)]);
    return choices;
  },
  choose: goTo,
  reset() {
    $("company").value = shownCompany;
  },
  leave(text) {
    // A field of one line holds no line breaks, but the name of a company may.
    if (text !== shownCompany.replace(/[\r\n]/g, "")) goTo(text);
  },
});

// What one has to type of a company's name: one line that a keyboard has.
const typeable = (name) => name.replace(/[\s\p{C}]+/gu, " ").trim() || "forget";
const FORGET_TIMEOUT = 600_000; // milliseconds

on("forget", "click", () => {
  $("forgetting-title").replaceChildren("Forget ", userText(shownCompany, 60), "?");
  $("to-type").replaceChildren(userText(typeable(shownCompany)));
  $("typed").value = "";
  $("forget-now").disabled = true;
  setText($("forget-status"), "");
  $("forgetting").showModal();
});

on("typed", "input", () => {
  const typed = $("typed").value;
  $("forget-now").disabled = !typed || typeable(typed) !== typeable(shownCompany);
});

on("forgetting", "submit", (event) => {
  event.preventDefault();
  sayOutcome($("forget-status"), "Forgetting it.", async () => {
    const company = shownCompany;
    const path = `company?${asQuery({ id: company })}`;
    const { forgotten } = await ask(path, { method: "DELETE", timeout: FORGET_TIMEOUT });
    companies.delete(company);
    keepSession(session.filter((change) => change.company !== company));
    $("forgetting").close();
    goTo("");
    say(`${count(forgotten)} bookings are forgotten.`);
    return "";
  });
});

// -------------------------------------------------------------------------------------------- CSV

// Where a spreadsheet would begin a formula: at the start of a cell, whatever separates cells.
const FORMULA = /(?<![^,;|\t\r\n])(?='*[" ]*[-=+@\t\r\uff1d\uff0b\uff0d\uff20])/g;

// A cell that no spreadsheet runs: with a ' where a formula would begin, unless it is a number.
function csvCell(value) {
  const text = String(value ?? "");
  const guarded = /^[-+]?[0-9][0-9.,]*$/.test(text) ? text : text.replace(FORMULA, "'");
  return `"${guarded.replaceAll('"', '""')}"`;
}

// A booking's columns: its sample as it is booked now, and how it came to be.
function csvRow({ seq, sample, account, name, predicted, confidence, reviewed, corrected }) {
  const isMoved = corrected && corrected.from !== account;
  return new Map(
    Object.entries({
      ...sample,
      ...(isMoved && { AccountName: name, AccountTypeName: "" }), // not those of the other account
      Seq: seq,
      Predicted: predicted,
      Confidence: confidence,
      Reviewed: reviewed,
    }),
  );
}

// Lines of a CSV file. Its columns are those that any booking has.
function csvLines(rows) {
  const columns = [...new Set(rows.flatMap((each) => [...each.keys()]))];
  const table = [columns, ...rows.map((each) => columns.map((column) => each.get(column)))];
  return table.map((cells) => `${cells.map(csvCell).join(",")}\r\n`);
}

on("download", "click", () =>
  sayOutcome($("company-status"), "Asking for its bookings.", async () => {
    const company = shownCompany;
    const rows = [];
    for await (const page of pages({ company })) rows.push(...page.bookings.map(csvRow));
    const download = `${company.replace(/[^\p{L}\p{N}_-]+/gu, "-").slice(0, 60)}.csv`;
    const file = new Blob(["\ufeff", ...csvLines(rows.reverse())], { type: "text/csv" });
    const href = URL.createObjectURL(file);
    element("a", { href, download }).click();
    URL.revokeObjectURL(href);
    return `${download} is among your downloads.`;
  }),
);

// ------------------------------------------------------------------------------------------ Curve

const SCORES = ["accuracy", "precision", "recall"];
let curve = []; // {bookings, accuracy, precision, recall} for each point

// Round numbers from 0 to the end: about as many as there may be at most.
function ticks(end, most) {
  const power = 10 ** Math.floor(Math.log10(end / most));
  const step = power * [1, 2, 5, 10].find((times) => times * power * most >= end);
  return Array.from({ length: Math.floor(end / step + 1e-6) + 1 }, (_, index) => index * step);
}

function drawCurve() {
  const { clientWidth: width, clientHeight: height } = $("curve");
  if (!width || !curve.length) return;
  const end = curve.at(-1).bookings;
  const [left, right, top, bottom] = [30, width - 26, 8, height - 44];
  const across = (bookings) => left + ((right - left) * bookings) / end;
  const down = (share) => bottom - (bottom - top) * share;
  const text = (x, y, anchor, words) => svgElement("text", { x, y, "text-anchor": anchor }, words);
  const path = (name, d) => svgElement("path", { class: name, d });

  const parts = [text(right, height - 4, "end", "bookings")];
  for (const share of [0, 0.2, 0.4, 0.6, 0.8, 1]) {
    parts.push(
      path(share ? "grid" : "axis", `M${left} ${down(share)}H${right}`),
      text(left - 8, down(share) + 4, "end", share.toFixed(1)),
    );
  }
  for (const bookings of ticks(end, Math.floor((right - left) / 70)).filter(Number.isInteger)) {
    parts.push(
      path("axis", `M${across(bookings)} ${bottom}v5`),
      text(across(bookings), bottom + 19, "middle", count(bookings)),
    );
  }
  for (const name of SCORES) {
    const line = curve.map((point) => `${across(point.bookings)} ${down(point[name])}`);
    parts.push(path(`line ${name}`, `M${line.join("L")}`));
  }
  const words = SCORES.map(
    (name) => `${name} from ${score(curve[0][name])} to ${score(curve.at(-1)[name])}`,
  );
  const [svg] = $("curve").children;
  svg.replaceChildren(...parts);
  svg.ariaLabel = `Over ${count(end)} bookings: ${words.join(", ")}.`;
}

new ResizeObserver(drawCurve).observe($("curve"));

// --------------------------------------------------------------------------------------- Coverage

const ENOUGH = 100; // bookings, to say what can be booked unseen

function showCoverage(levels, switchOn, scored, unknown) {
  const checks = levels[0]?.checks;
  const each = checks > 1 ? "checks, each of" : "a check,";
  const ofThem = checks ? `, ${count(checks)} of them ${each} which stands for ${CHECK}` : "";
  setText($("evidence"), `${count(scored)} bookings by a person${ofThem}`);
  setText($("coverage-of"), shownCompany && `Of ${shownCompany.slice(0, 60)} only. `);

  setText(
    $("coverage-sentence"),
    switchOn
      ? `Could be booked unseen: ${percent(switchOn.share)} of the bookings, all that are at least ` +
          `${percent(switchOn.at_least, 0)} sure. With ${percent(switchOn.certainty, 0)} certainty ` +
          `at most ${percent(switchOn.wrong, 0)} of these would be wrong.`
      : "From when on bookings could be booked unseen, nobody can know yet.",
  );
  const ofCompany = shownCompany && "for this company ";
  const none =
    health.samples < ENOUGH
      ? `Too early to say: this takes ${ENOUGH} bookings.`
      : `No prediction ${ofCompany}could be compared with a person’s booking yet.`;
  setText($("no-coverage"), unknown ?? none);
  $("no-coverage").classList.toggle("error", Boolean(unknown));
  fillTable("coverage", levels, levelRow);
}

function levelRow({ at_least: from, share, accuracy, error }) {
  const isMeasured = accuracy !== null;
  const wrong = isMeasured ? count(Math.round(1000 * share * (1 - accuracy))) : "–";
  return row(
    element("th", { scope: "row", role: "rowheader" }, percent(from, 0)),
    numberCell(percent(share)),
    numberCell(percent(accuracy), muted(isMeasured ? ` ± ${percent(error)}` : "")),
    numberCell(wrong),
  );
}

// ---------------------------------------------------------------------------------------- Refresh

const PAUSE = 2000; // milliseconds between two refreshes
const LONGEST_PAUSE = 10_000; // of a service that does not answer

let isRefreshing = false;
let pause = PAUSE;
let timer;
let lastSeen; // a time of day

// What the service says of all, and of the company. If there is no such company, why.
async function overview() {
  try {
    return await ask(`overview?${asQuery({ company: shownCompany })}`);
  } catch (error) {
    if (error.cause !== 404) throw error;
    return {
      ...(await ask("overview")),
      confidence: [],
      switch_on: null,
      unknown: asSentence(error),
    };
  }
}

async function refresh() {
  const needsToken = !$("access").hidden && sessionStorage.getItem("token") === null;
  if (isRefreshing || needsToken || document.hidden) return;
  isRefreshing = true;
  clearTimeout(timer);
  const asked = shownCompany;
  try {
    const found = await overview();
    if (asked === shownCompany) show(found);
    lastSeen = new Date().toLocaleTimeString("en-GB");
    pause = PAUSE;
    $("access").hidden = true;
    const { status } = found.health;
    showState(status === "ok", status === "ok" ? "Connected" : `Connected, but ${status}`);
  } catch (error) {
    pause = Math.min(2 * pause, LONGEST_PAUSE);
    const reasons = { 0: "Not reachable", 401: "Token needed" };
    const reason = reasons[error.cause] ?? `Not answering: ${error.message}`;
    showState(false, lastSeen ? `${reason}; last figures from ${lastSeen}` : reason);
    if (!(error instanceof ServiceError)) throw error;
  } finally {
    isRefreshing = false;
    timer = setTimeout(refresh, asked === shownCompany ? pause : 0);
  }
}

function showState(isGood, text) {
  $("state").className = isGood ? "good" : "bad";
  setText($("state"), text);
}

// Leaves out what the token does not give access to.
function showAccess({ company, may_change }) {
  ownCompany = company;
  for (const node of document.querySelectorAll(".of-all")) node.hidden = company !== null;
  for (const node of document.querySelectorAll(".changes")) node.hidden = !may_change;
  $("try-company").readOnly = company !== null;
  if (company === null) return;
  $("try-company").value = company;
  for (const node of document.querySelectorAll(".whose"))
    setText(node, JSON.stringify(company).slice(1, -1));
  follow();
}

function show(found) {
  health = found.health;
  curve = found.curve;
  target = found.target;
  showContext(found.context);
  showAccess(found);
  const { samples, unseen } = health;
  const confidence = samples < ENOUGH ? [] : found.confidence;
  for (const name of ["samples", "accounts"]) setText($(name), count(health[name]));
  setText($("companies"), count(health.companies ?? 1));
  for (const name of SCORES) setText($(name), score(found.metrics?.[name]));
  const verb = unseen === 1 ? "it is" : "they are";
  const text = `Nobody has looked at ${count(unseen)} of the bookings yet: ${verb} not learned.`;
  setText($("unseen"), unseen ? text : "");
  showCoverage(confidence, found.switch_on, found.scored, found.unknown);

  setText($("origin"), location.origin);
  for (const node of document.querySelectorAll(".target")) setText(node, target);
  const hasToken = sessionStorage.getItem("token") !== null;
  for (const node of document.querySelectorAll(".locked")) node.hidden = !hasToken;
  $("start").hidden = samples > 0;
  $("report").hidden = samples === 0;
  for (const node of document.querySelectorAll("[data-of]")) {
    const isEmpty = !{ curve, confidence }[node.dataset.of].length;
    node.hidden = isEmpty !== node.matches(".none");
  }
  drawCurve();
  keepUp();
  if (health.lines !== companyLines && Date.now() - companyTime > REREAD) showCompany();
}

document.addEventListener("visibilitychange", refresh);

keepSession(session);
$("session").open = innerWidth > 1000;
showSelected();
follow();
refresh();
