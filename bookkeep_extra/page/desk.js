'use strict';
const PAUSE = 2000, LONGEST_PAUSE = 10000, TIMEOUT = 10000, LONG = 600000; // milliseconds
const REREAD = 10000; // milliseconds after which a company's own view is asked for anew
const STEPS = [0, 0.5, 0.8, 0.9, 0.95, 0.99]; // of the filter
const ENOUGH = 100; // bookings, to say what can be booked unseen
const CHECKED = 16; // bookings that a check stands for
const REASONS = 13; // shown for one suggestion: a long text has hundreds
const AT_ONCE = 500, TIMES = 20; // bookings in one answer, and answers, to look for names
const FIRST = 10, MORE = 25, LATEST = 12; // bookings in a list
const SCORES = ['accuracy', 'precision', 'recall'];
const KEYS = { // what each presses, how that is called, and what it does
  c: ['confirm', 'Confirm', 'confirm it: the account is right'],
  a: ['other', 'Change', 'book it to another account'],
  w: ['ask', 'Why', 'say why this was suggested'], u: ['undo', 'Undo', 'take the last change back'],
  k: ['previous', 'Previous', 'go to the one before'], j: ['next', 'Next', 'go to the next one'],
  '/': ['company', '', 'choose a company'], '?': ['help', '', 'show these keys'],
};
const HEADS = { // of tables, those with a # over figures
  list: ['Date', 'Company', 'Text', '#Amount', 'Booked to', 'Suggested', '#Confidence'],
  'accounts-of': ['Its accounts', '#Bookings', 'Last one'],
  'latest-of': ['Its latest', 'Text', '#Amount', 'Booked to'],
  steps: ['Confidence from', '#Booked unseen', '#Right of these', '#Wrong in 1,000 bookings'],
  shortcuts: ['Key', 'What it does'],
};

const $ = (id) => document.getElementById(id);
const on = (id, event, act) => $(id).addEventListener(event, act);
const count = (number) => number.toLocaleString('en');
const score = (number) => number == null ? '–' : number.toFixed(3);
const percent = (share, digits = 1) => share == null ? '–' : `${(100 * share).toFixed(digits)}%`;
const signed = (number) => `${number < 0 ? '−' : '+'}${Math.abs(number).toFixed(2)}`;
const asQuery = (filters) =>
  new URLSearchParams(Object.entries(filters).filter(([, text]) => text)).toString();
// What the service says gets into the page as text, by the next three only.

const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const holding = (node, children) => { node.append(...children); return node; };
const make = (tag, properties, ...children) =>
  holding(Object.assign(document.createElement(tag), properties), children);
const shape = (tag, attributes, ...children) => {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  Object.entries(attributes).forEach((each) => node.setAttribute(...each));
  return holding(node, children);
};
const value = (text, most = 150) => // characters: laying out 10,000 of them takes seconds
  make('bdi', { title: text }, text.length > most ? `${text.slice(0, most)}…` : text);
const clip = (...children) => make('span', { className: 'clip' }, ...children);
const cell = (...children) => make('td', { role: 'cell' }, ...children);
const number = (...children) => make('td', { role: 'cell', className: 'number' }, ...children);
const quiet = (...children) => make('span', { className: 'muted' }, ...children);
const whole = (...children) => make('span', { className: 'whole' }, ...children); // in one line
const row = (...cells) => make('tr', { role: 'row' }, ...cells);
const button = (how, ...children) => make('button', { type: 'button', ...how }, ...children);
const day = ({ BankEntryDate: date }) => date?.slice(0, 10) || '–';
const names = new Map(); // of accounts, as each company calls them
const named = (whose, id) => names.get(JSON.stringify([whose, id]));
const account = (whose, id) => // with its name
  [whole(value(id, 40)), ...named(whose, id) ? [' ', quiet(value(named(whose, id)))] : []];
const filled = new Map();
function fill(id, items, line) { // a table, unless it shows these
  const state = JSON.stringify(items);
  if (filled.get(id) !== state) $(id).tBodies[0].replaceChildren(...items.map(line));
  filled.set(id, state);
}

// ------------------------------------------------------------------------------------ The service
class Refused extends Error {} // its cause is the status, 0 without an answer
async function call(path, { body, method, text = false, timeout = TIMEOUT } = {}) {
  const token = sessionStorage.getItem('token');
  const headers = { ...token && { Authorization: `Bearer ${token}` },
    ...body && { 'Content-Type': 'application/json' } };
  const options = { method: method ?? (body ? 'POST' : 'GET'), headers,
    body: body && JSON.stringify(body), signal: AbortSignal.timeout(timeout) };
  let response, answer;
  try {
    response = await fetch(path, options);
    answer = await (response.ok && text ? response.text() : response.json());
  } catch ({ name }) {
    const odd = name === 'SyntaxError'; // a proxy's own answer
    throw new Refused(odd ? `something answered ${response.status}, not the service`
      : name === 'TimeoutError' ? 'the service took too long to answer'
        : 'the service is not reachable', { cause: odd ? response.status : 0 });
  }
  if (response.status === 401) askForToken(token);
  if (!response.ok) throw new Refused(answer.error, { cause: response.status });
  return answer;
}

function sentence(error) {
  if (!(error instanceof Refused)) throw error;
  return `${error.message[0].toUpperCase()}${error.message.slice(1)}.`;
}
async function telling(node, first, act) { // and then what comes of it
  put(node, first);
  put(node, await act().catch(sentence));
}
function askForToken(refused) {
  // A newer token may have been entered while this request was on its way.
  if (sessionStorage.getItem('token') !== refused) return;
  sessionStorage.removeItem('token');
  put($('wanted'), refused ? 'The service refused this token. Enter another one.'
    : 'This service answers only those who send its token.');
  $('access').hidden = false;
  if ($('report').hidden) $('token').focus();
}
on('access', 'submit', (event) => {
  event.preventDefault();
  sessionStorage.setItem('token', $('token').value);
  $('token').value = '';
  put($('wanted'), 'Asking the service.');
  refresh();
});
let busy = false, pause = PAUSE, timer, seen, company = '';
const overview = () => call(`overview?${asQuery({ company })}`).catch(async (error) => {
  if (error.cause !== 404) throw error;
  return { ...await call('overview'), confidence: [], unknown: sentence(error) };
});

async function refresh() {
  const waiting = !$('access').hidden && sessionStorage.getItem('token') === null;
  if (busy || waiting || document.hidden) return;
  busy = true;
  clearTimeout(timer);
  const asked = company;
  try {
    const found = await overview();
    if (asked === company) show(found);
    seen = new Date().toLocaleTimeString('en-GB');
    pause = PAUSE;
    $('access').hidden = true;
    const { status } = found.health;
    $('state').className = status === 'ok' ? 'good' : 'bad';
    put($('state'), status === 'ok' ? 'Connected' : `Connected, but ${status}`);
  } catch (error) {
    pause = Math.min(2 * pause, LONGEST_PAUSE);
    const why = error.cause === 0 ? 'Not reachable' : error.cause === 401 ? 'Token needed'
      : `Not answering: ${error.message}`;
    $('state').className = 'bad';
    put($('state'), seen ? `${why}; last figures from ${seen}` : why);
    if (!(error instanceof Refused)) throw error;
  } finally {
    busy = false;
    timer = setTimeout(refresh, asked === company ? pause : 0);
  }
}
document.addEventListener('visibilitychange', refresh);

// -------------------------------------------------------------------------------------- The curve
let points = [];
function ticks(end, most) {
  const power = 10 ** Math.floor(Math.log10(end / most));
  const step = power * [1, 2, 5, 10].find((times) => times * power * most >= end);
  return Array.from({ length: Math.floor(end / step + 1e-6) + 1 }, (_, index) => index * step);
}
function draw() {
  const { clientWidth: width, clientHeight: height } = $('curve');
  if (!width || !points.length) return;
  const start = 30, stop = width - 26, top = 8, bottom = height - 44, end = points.at(-1).bookings;
  const across = (x) => start + (stop - start) * x / end, down = (y) => bottom - (bottom - top) * y;
  const text = (x, y, anchor, words) => shape('text', { x, y, 'text-anchor': anchor }, words);
  const path = (name, d) => shape('path', { class: name, d });
  const parts = [text(stop, height - 4, 'end', 'bookings')];
  for (const y of [0, 0.2, 0.4, 0.6, 0.8, 1]) {
    parts.push(path(y ? 'grid' : 'axis', `M${start} ${down(y)}H${stop}`),
      text(start - 8, down(y) + 4, 'end', y.toFixed(1)));
  }
  for (const x of ticks(end, Math.floor((stop - start) / 70)).filter(Number.isInteger)) {
    parts.push(path('axis', `M${across(x)} ${bottom}v5`),
      text(across(x), bottom + 19, 'middle', count(x)));
  }
  const way = (name) => points.map((each) => `${across(each.bookings)} ${down(each[name])}`);
  parts.push(...SCORES.map((name) => path(`line ${name}`, `M${way(name).join('L')}`)));
  const [svg] = $('curve').children, words = SCORES.map((name) =>
    `${name} from ${score(points[0][name])} to ${score(points.at(-1)[name])}`);
  svg.replaceChildren(...parts);
  svg.ariaLabel = `Over ${count(end)} bookings: ${words.join(', ')}.`;
}

new ResizeObserver(draw).observe($('curve'));
for (const name of SCORES) {
  const sample = shape('svg', { viewBox: '0 0 32 12', 'aria-hidden': true },
    shape('path', { class: `line ${name}`, d: 'M0 6h32' }));
  $('legend').append(make('dt', {}, sample, name), make('dd', { id: name }));
}

// --------------------------------------------------------------------------------- The completion
/* A field with completion. `found(text)` gives what fits, best first: [choice, ...what is shown of
   it]; `choose` takes a choice; `reset` is for Escape; `leave` takes the text that is left. */
class Completion {
  constructor(id, ariaLabel, does) {
    Object.assign(this, { field: $(id), leave() {} }, does);
    this.list = make('ul', { id: `${id}-list`, role: 'listbox', ariaLabel });
    this.list.addEventListener('pointerdown', (event) => event.preventDefault()); // keeps the focus
    this.field.after(this.list);
    this.field.setAttribute('aria-controls', this.list.id);
    Object.assign(this.field, { role: 'combobox', ariaAutoComplete: 'list' });
    on(id, 'input', () => this.open());
    on(id, 'focus', () => { this.field.select(); this.open(); });
    on(id, 'blur', () => { this.show([]); this.leave(this.field.value); });
    on(id, 'keydown', (event) => this.press(event));
    this.show([]);
  }
  open(at = 0) { this.show(this.found(this.field.value), at); }

  show(choices, at = 0) {
    this.at = Math.max(0, Math.min(at, choices.length - 1));
    this.choice = choices[this.at]?.[0] ?? null;
    this.list.replaceChildren(...choices.map(([choice, ...shown], place) => make('li', {
      role: 'option', id: `${this.list.id}-${place}`, ariaSelected: String(place === this.at),
      onclick: () => this.take(choice) }, ...shown)));
    this.list.hidden = !choices.length;
    this.field.ariaExpanded = String(!this.list.hidden);
    this.field.setAttribute('aria-activedescendant', this.list.children[this.at]?.id ?? '');
    this.list.children[this.at]?.scrollIntoView({ block: 'nearest' });
  }
  take(choice) { this.show([]); this.choose(choice); }
  press(event) {
    const way = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === 'Enter') this.take(this.choice ?? this.field.value);
    else if (event.key === 'Escape') { this.show([]); this.reset(); }
    else if (way) this.open(this.list.hidden ? 0 : this.at + way);
    else return;
    event.preventDefault();
  }
}

// What fits a text: first what is equal to it, then what begins with it, then what holds it.
function fitting(items, text, words) {
  const wanted = text.trim().toLowerCase();
  const rank = (item) => Math.min(...words(item).map((word) => {
    const at = word.toLowerCase().indexOf(wanted);
    return at < 0 ? 3 : word.length === wanted.length ? 0 : Math.min(at, 1) + 1;
  }));
  return items.map((item) => [rank(item), item]).filter(([place]) => place < 3)
    .sort(([x], [y]) => x - y).slice(0, 50).map(([, item]) => item);
}

// -------------------------------------------------------------------------------- The suggestions
const turns = new WeakMap();
let checked = false;

async function suggest(box, sample) {
  const turn = {}, [told, rest, note, ranking] = box.children;
  turns.set(box, turn);
  let suggestions = [], verdict, basis = [];
  try {
    const { record, ...found } = await call('suggest?top=5', { body: sample });
    const [{ account: first, confidence, over, reasons }] = found.suggestions;
    const isNew = record.known === 'nothing of the company';
    if (isNew && over && reasons.every(({ kind }) => kind === 'amount')) {
      verdict = ['Nothing is known of this company yet, nor of these words.'];
    } else {
      ({ suggestions } = found);
      verdict = [isNew ? 'Nothing is known of this company yet. By what others book, m' : 'M',
        'ost likely ', make('b', {}, ...account(sample.CompanyId, first)),
        `, with ${percent(confidence)} confidence.`];
      basis = rests(sample.CompanyId, first, record, isNew);
    }
  } catch (error) {
    verdict = [make('span', { className: 'error' }, sentence(error))];
  }
  if (turn !== turns.get(box)) return;
  told.replaceChildren(...verdict);
  rest.replaceChildren(...basis);
  ranking.replaceChildren(...suggestions.map((each, rank) =>
    suggestion(each, rank, sample.CompanyId)));
  note.hidden = suggestions.length < 2;
}

function rests(name, first, { known, own, all }, isNew) {
  const evidence = 'with about as much evidence';
  const its = isNew ? [] : [...tally(make('span', {}, value(name, 40), '’s own'),
    ['of ', value(first, 40), ` ${evidence}`], own), ' '];
  const ofAll = tally('all companies’', [`of any account ${evidence} and ${known} known`], all);
  const note = checked && all.suggestions ? ` A check counts as ${CHECKED} of these.` : '';
  return [...its, ...ofAll, note];
}
function tally(whose, which, { suggestions, right }) {
  const [start, end] = suggestions === 0 ? ['There are none yet of ', '.']
    : suggestions === 1 ? ['The only one of ', right ? ' was right.' : ' was wrong.']
      : ['Of ', `, ${right ? count(right) : 'none'} ${right === 1 ? 'was' : 'were'} right.`];
  return [start, whose, suggestions > 1 ? ` ${count(suggestions)}` : '', ' suggestions ', ...which,
    end];
}
function suggestion({ account: id, confidence, over, margin, prior, reasons }, rank, name) {
  const sure = make('span', { className: 'bar' }, make('span', {}));
  sure.firstChild.style.width = percent(confidence);
  const why = make('div', {}, over === null ? 'There is no other account yet to compare it with.'
    : weights(over, margin, prior, reasons));
  const summary = make('summary', {}, clip(...account(name, id)), sure,
    make('span', { className: 'number' }, percent(confidence)));
  return make('li', {}, make('details', { open: rank === 0 }, summary, why));
}

function weights(over, margin, prior, reasons) {
  const bySize = reasons.toSorted((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  const shown = new Set(bySize.slice(0, REASONS)), others = bySize.slice(REASONS);
  const rows = [{ token: 'how often each is booked', kind: '', weight: prior },
    ...reasons.filter((reason) => shown.has(reason))];
  if (others.length) {
    const weight = others.reduce((sum, reason) => sum + reason.weight, 0);
    rows.push({ token: `${count(others.length)} more`, kind: '', weight });
  }
  const most = Math.max(...rows.map((each) => Math.abs(each.weight)));
  const body = rows.map(({ token, kind, weight }) => make('tr', {},
    make('td', {}, clip(value(token, 40), ' ', quiet(kind))),
    make('td', {}, weightBar(weight / most)), number(signed(weight))));
  const sum = make('tr', {}, make('td', {}, 'Together'), make('td', {}), number(signed(margin)));
  return make('table', { className: 'reasons' },
    make('caption', {}, 'For it, and against ', value(over, 40)), make('tbody', {}, ...body, sum));
}
function weightBar(part) {
  const bar = make('span', { className: part < 0 ? 'against' : '' });
  Object.assign(bar.style,
    { left: percent(0.5 + Math.min(0, part) / 2), width: percent(Math.abs(part) / 2) });
  return make('span', { className: 'bar zero' }, bar);
}
on('try', 'submit', (event) => {
  event.preventDefault();
  suggest($('suggestions'), Object.fromEntries(new FormData($('try'))));
});

// ------------------------------------------------------------------------------------- The review
const bookings = new Map(); // by seq, as last heard of
const companies = new Set(); // that were heard of
const ledgers = new Map(); // by company: what its last bookings say
let session = JSON.parse(sessionStorage.getItem('session') ?? '[]'); // changes, the oldest first
let health, queue, current, storing = false;
const changeOf = (seq) => session.findLast((change) => change.seq === seq);
const lineOf = (seq) => $('list').querySelector(`[data-seq="${seq}"]`);
const pickOf = (seq) => lineOf(seq)?.querySelector('button');
const say = (text, bad = false) => {
  put($('said'), text);
  $('said').classList.toggle('error', bad);
};
function hear(booking) {
  const { seq, sample, account: id, name, predicted, predicted_name: other, reviewed } = booking;
  const before = bookings.get(seq);
  bookings.set(seq, booking);
  companies.add(sample.CompanyId);
  names.set(JSON.stringify([sample.CompanyId, id]), name);
  names.set(JSON.stringify([sample.CompanyId, predicted]), other);
  if (before && (before.account !== id || before.reviewed !== reviewed)) redraw(seq);
  return booking;
}
function redraw(seq) {
  const focused = pickOf(seq) === document.activeElement;
  lineOf(seq)?.replaceWith(line(bookings.get(seq)));
  if (focused) pickOf(seq)?.focus();
  if (seq === current) showChosen();
}
function standing({ seq, account: id, reviewed, corrected, booked_by: by }) {
  const change = changeOf(seq), from = (change ?? corrected)?.from;
  const words = !reviewed ? ['unseen'] : from && from !== id ? ['was ', value(from, 40)]
    : from ? ['confirmed'] : by === 'check' ? ['checked'] : null;
  const className = change ? 'good' : 'muted';
  return words ? [' ', make('span', { className }, change ? '✓ ' : '· ', ...words)] : [];
}

function line(booking) {
  const { seq, sample, account: id, predicted, confidence } = booking, chosen = seq === current;
  const pick = button({ className: 'pick', onfocus: () => select(seq),
    tabIndex: chosen ? 0 : -1 }, clip(value(sample.BankEntryText)));
  pick.setAttribute('aria-describedby', 'when facts');
  const suggested = changeOf(seq) ? standing(booking)
    : predicted === id ? [quiet('the same')]
      : predicted ? account(sample.CompanyId, predicted) : ['–'];
  const made = row(cell(day(sample)), cell(clip(value(sample.CompanyId))), cell(pick),
    number(clip(value(sample.BankEntryAmount))), cell(clip(...account(sample.CompanyId, id))),
    cell(clip(...suggested)), number(percent(confidence)));
  made.dataset.seq = seq;
  return Object.assign(made, { className: changeOf(seq) ? 'done' : '',
    ariaCurrent: chosen ? 'true' : null, onclick: () => pick.focus() });
}

function select(seq) {
  const before = current;
  if (seq === before) return;
  current = seq;
  for (const each of [before, seq].filter(lineOf)) {
    lineOf(each).ariaCurrent = each === seq ? 'true' : null;
    pickOf(each).tabIndex = each === seq ? 0 : -1;
  }
  showChooser(false);
  showChosen();
  explain();
}

function showChosen() {
  const booking = bookings.get(current);
  for (const id of ['confirm', 'other', 'ask']) $(id).disabled = !booking;
  $('panel').hidden = !booking && !session.length;
  if (!booking) return;
  const { sample, account: id, predicted, confidence } = booking;
  const href = `#${asQuery({ company: sample.CompanyId })}`;
  $('when').replaceChildren(make('a', { href }, value(sample.CompanyId, 60)), ` · ${day(sample)}`);
  $('text').replaceChildren(value(sample.BankEntryText, 400));
  $('amount').replaceChildren(value(sample.BankEntryAmount));
  $('booked').replaceChildren(...account(sample.CompanyId, id), ...standing(booking));
  $('suggested').replaceChildren(...predicted === null ? ['nothing']
    : [...predicted === id ? ['the same'] : account(sample.CompanyId, predicted),
      `, ${percent(confidence)} sure`]);
}

function explain() {
  const booking = bookings.get(current), open = $('ask').ariaExpanded === 'true' && booking;
  $('why').hidden = !open;
  if (open) suggest($('why'), booking.sample);
}
function load() {
  const filters = { company, below: $('below').value, order: $('order').value };
  queue = { filters, phases: $('reviewed').value.split(' '), seqs: [], samples: health.samples };
  return more(FIRST);
}

async function more(most = MORE) {
  const asked = queue, isFirst = !asked.seqs.length, lines = [];
  asked.loading = true;
  try {
    for (let missing = most; asked.phases.length && missing > 0;) {
      const [phase] = asked.phases, { filters, before } = asked;
      const query = asQuery({ ...filters, reviewed: phase, limit: missing, before });
      const answer = await call(`bookings?${query}`);
      if (asked !== queue) return;
      asked.before = answer.next;
      if (!answer.next) asked.phases.shift();
      const found = answer.bookings.map(hear)
        .filter(({ seq }) => !changeOf(seq) && !asked.seqs.includes(seq));
      if (found.length && asked.group !== phase) {
        asked.group = phase;
        lines.push(row(make('th', { scope: 'rowgroup', role: 'rowheader',
          colSpan: filters.company ? 6 : 7 },
          phase === 'no' ? 'Booked unseen, not looked at yet' : 'Booked or seen by a person')));
      }
      asked.seqs.push(...found.map(({ seq }) => seq));
      lines.push(...found.map(line));
      missing -= found.length;
    }
    asked.failed = null;
  } catch (error) {
    if (asked !== queue) return;
    asked.failed = error;
    if (!isFirst) say(sentence(error), true);
  } finally {
    asked.loading = false;
  }
  const [body] = $('list').tBodies, none = !asked.seqs.length;
  body.replaceChildren(...isFirst ? lines : [...body.children, ...lines]);
  $('list').classList.toggle('one', Boolean(asked.filters.company));
  $('list').hidden = none;
  $('more').hidden = none || !asked.phases.length;
  put($('empty'), !none ? ''
    : asked.failed ? sentence(asked.failed) : 'There is nothing to review.');
  if (isFirst && !asked.seqs.includes(current)) select(asked.seqs[0]);
}

function keepUp(now) {
  health = now;
  const failed = queue?.failed && queue.failed.cause !== 404;
  const stale = !queue || failed || queue.samples !== health.samples;
  const used = queue?.seqs.length && (queue.used || $('review').matches(':hover, :focus-within'));
  $('fresh').hidden = !stale || !used;
  if (stale && !used && !queue?.loading && health.samples) load();
  if (health.lines !== own.lines && Date.now() - own.at > REREAD) showOwn();
}

/* Goes to the next booking of the list, or the one before, that it does not skip, if there is one.
   The focus goes along, unless it is on one of the buttons beside. */
async function move(way, skip = () => false) {
  queue.used = true;
  let at = queue.seqs.indexOf(current) + way;
  while (skip(queue.seqs[at])) at += way;
  if (at >= queue.seqs.length && queue.phases.length && !queue.loading) await more();
  const seq = queue.seqs[at];
  if (seq === undefined) return ` That was the ${way > 0 ? 'last' : 'first'} one.`;
  if ($('buttons').contains(document.activeElement)) select(seq);
  else pickOf(seq).focus();
  lineOf(seq).scrollIntoView({ block: 'nearest' });
  return '';
}

/* Changes a booking, unless one is being changed: looks how it stands now, then sends it to an
   account if `check` finds nothing to say, and `tell`s what came of it. */
async function store(seq, check, to, tell) {
  if (storing || seq === undefined) return;
  storing = queue.used = true;
  const slow = setTimeout(() => say('Storing …'), 400);
  try {
    const now = hear(await call(`bookings/${seq}`)), objection = check(now);
    if (objection) return say(`${objection} Nothing was changed.`, true);
    const { before } = await call('correct', { body: { seq, AccountNumber: to } });
    ledgers.delete(now.sample.CompanyId);
    hear({ ...now, account: to, name: named(now.sample.CompanyId, to) ?? null, reviewed: true });
    const words = tell(now, before);
    redraw(seq);
    say(words + (changeOf(seq) ? await move(1, changeOf) : ''));
  } catch (error) {
    say(sentence(error), true);
    if (error.cause === 404) load(); // it was forgotten
  } finally {
    clearTimeout(slow);
    storing = false;
  }
}

function book(to) {
  const seq = current, { account: shown, reviewed } = bookings.get(seq);
  return store(seq, (now) => now.account !== shown ? `Meanwhile it was booked to ${now.account}.`
    : now.reviewed !== reviewed ? 'Meanwhile it was confirmed.' : '', to, ({ sample }, from) => {
    const { CompanyId, BankEntryText } = sample, text = BankEntryText.slice(0, 150);
    remember([...session, { seq, from, to, unseen: !reviewed, company: CompanyId, text }]);
    return from === to ? `Confirmed ${to}.` : `Booked to ${to}, no longer to ${from}.`;
  });
}
function takeBack(change) {
  const { seq, from, to, unseen } = change;
  return store(seq, (now) => now.account === to ? '' : `Meanwhile it was booked to ${now.account}.`,
    from, () => {
      remember(session.filter((each) => each !== change));
      if ($('list').contains(document.activeElement)) pickOf(seq)?.focus();
      select(seq);
      return from !== to ? `Back to ${from}.` : unseen
        ? `Back on the desk, but learned as ${to} until it is booked to another account.`
        : 'Back on the desk.';
    });
}

function remember(changes) {
  session = changes;
  sessionStorage.setItem('session', JSON.stringify(session));
  const confirmed = session.filter(({ from, to }) => from === to).length;
  $('session').hidden = $('undo').disabled = !session.length;
  const [told, list] = $('session').children;
  put(told, `This session: ${count(confirmed)} confirmed, `
    + `${count(session.length - confirmed)} changed`);
  list.replaceChildren(...session.slice(-LATEST).reverse().map((change) => {
    const what = change.from === change.to ? ['confirmed ', value(change.to, 40)]
      : [value(change.from, 40), ' → ', value(change.to, 40)];
    return make('li', {}, make('span', {}, clip(value(change.text)), quiet(...what)),
      button({ onclick: () => takeBack(change), ariaLabel: `Undo: ${change.text}` }, 'Undo'));
  }));
}

const showChooser = (open) => { $('other').ariaExpanded = String(!($('choose').hidden = !open)); };
const leaveChooser = () => { showChooser(false); (pickOf(current) ?? $('other')).focus(); };
const chooser = new Completion('account', 'Accounts', {
  found(text) {
    const { sample, account: id, predicted, confidence } = bookings.get(current);
    const whose = sample.CompanyId, { accounts } = ledger(whose), typed = text.trim();
    const often = [...accounts.keys()]
      .sort((one, other) => accounts.get(other).times - accounts.get(one).times);
    const ids = [...new Set([predicted ?? id, id, ...often])];
    const note = (each) => each === id ? 'now' : each === predicted ? `${percent(confidence)} sure`
      : count(accounts.get(each).times);
    const found = fitting(ids, text, (each) => [each, named(whose, each) ?? '']);
    const shown = (each) => [each, make('span', {}, ...account(whose, each)), quiet(note(each))];
    return [...found.map(shown),
      ...!typed || ids.includes(typed) ? [] : [[typed, value(typed), quiet('new here')]]];
  },
  choose(id) { leaveChooser(); if (id) book(id); },
  reset: leaveChooser,
});

const ACTIONS = {
  next: async () => say(await move(1)),
  previous: async () => say(await move(-1)),
  confirm: () => book(bookings.get(current).account),
  undo: () => takeBack(session.at(-1)),
  more: () => { queue.used = true; more(); },
  fresh: load,
  help: () => $('keys').showModal(),
  ask: () => { $('ask').ariaExpanded = String($('ask').ariaExpanded !== 'true'); explain(); },
  async other() {
    if (!$('choose').hidden) return leaveChooser();
    showChooser(true);
    $('account').value = '';
    $('account').focus();
    await ledger(bookings.get(current).sample.CompanyId).read;
    if (document.activeElement === $('account')) chooser.open();
  },
};
for (const id of ['reviewed', 'below', 'order']) on(id, 'change', load);

document.addEventListener('keydown', (event) => {
  const arrow = event.target.closest('#list') && { ArrowDown: 'j', ArrowUp: 'k' }[event.key];
  const key = arrow || event.key, elsewhere = event.target.closest('input, select, dialog, .part');
  if (!Object.hasOwn(KEYS, key) || elsewhere || event.ctrlKey || event.metaKey || event.altKey
    || $('report').hidden || !arrow && !$('keys-on').checked) return;
  event.preventDefault();
  const [id] = KEYS[key];
  if (id === 'company') $(id).focus();
  else if (!event.repeat || 'jk'.includes(key)) $(id).click();
});

for (const [id, heads] of Object.entries(HEADS)) {
  $(id).append(make('thead', { role: 'rowgroup' }, row(...heads.map((name) => make('th', {
    scope: 'col', role: 'columnheader', className: name[0] === '#' ? 'number' : '',
  }, name.replace('#', ''))))), make('tbody', { role: 'rowgroup' }));
}
for (const [key, [id, label, words]] of Object.entries(KEYS)) {
  if (label) $('buttons').append(button({ id }, label, make('kbd', {}, key)));
  $('shortcuts').tBodies[0].append(row(cell(make('kbd', {}, key)), cell(words)));
}
for (const [id, act] of Object.entries(ACTIONS)) on(id, 'click', act);
$('keys-on').checked = localStorage.getItem('keys') !== 'off';
on('keys-on', 'change', () => localStorage.setItem('keys', $('keys-on').checked ? 'on' : 'off'));
$('below').append(...STEPS.slice(1).reverse().map((level) =>
  make('option', { value: level }, `below ${percent(level, 0)}`)));
remember(session);
$('session').open = innerWidth > 1000;
showChosen();

// --------------------------------------------------------------------------- A company's own view
const own = { lines: null, at: 0 }; // of the log, and when, that it shows
/* Asks for the last bookings until `take` has enough of them. */
async function readBack(filters, take) {
  for (let times = 0, before; times < TIMES; times++) {
    const answer = await call(`bookings?${asQuery({ ...filters, limit: AT_ONCE, before })}`);
    before = answer.next;
    if (take(answer.bookings.map(hear), before) || !before) return;
  }
}

function ledger(name) {
  if (ledgers.has(name)) return ledgers.get(name);
  const made = { accounts: new Map(), bookings: 0, latest: [] };
  made.read = readBack({ company: name }, (found, next) => {
    for (const { account: id, sample } of found) {
      const { times = 0, last = day(sample) } = made.accounts.get(id) ?? {};
      made.accounts.set(id, { times: times + 1, last });
    }
    made.bookings += found.length;
    made.latest.push(...found.slice(0, LATEST - made.latest.length));
    made.goesOn = next;
  }).catch((error) => { ledgers.delete(name); made.failed = error; });
  ledgers.set(name, made);
  return made;
}

async function showOwn() {
  const name = company;
  Object.assign(own, { lines: health.lines, at: Date.now() });
  if (!name) return;
  ledgers.delete(name);
  const made = ledger(name);
  const report = await call(`report/1000?${asQuery({ company: name })}`).catch(() => null);
  await made.read;
  if (name !== company) return;
  $('own').hidden = Boolean(made.failed);
  if (made.failed) return;
  $('own-title').replaceChildren(value(name, 60));
  const figures = [['Bookings', count(made.bookings), made.goesOn ? 'the last ones' : '']];
  if (report) {
    const { support, accuracy, precision, recall, confidence } = report;
    figures.push([`Right, of the last ${count(support)} suggestions`, percent(accuracy),
      `precision ${score(precision)}, recall ${score(recall)}`]);
    const levels = confidence.filter((each) => [0.9, 0.95].includes(each.at_least));
    for (const { at_least: from, share, accuracy: right, error } of levels) {
      figures.push([`Could be booked unseen from ${percent(from, 0)} confidence on`, percent(share),
        right === null ? '' : `${percent(right)} ± ${percent(error)} of them right`]);
    }
  } else figures.push(['Suggestions', '–', 'none that a person has seen yet']);
  $('own-figures').replaceChildren(...figures.flatMap(([what, figure, more]) =>
    [make('dt', {}, what), make('dd', {}, figure, ' ', quiet(more))]));
  const often = [...made.accounts].sort(([, a], [, b]) => b.times - a.times);
  fill('accounts-of',
    often.map(([id, { times, last }]) => [id, count(times), last, name, named(name, id)]),
    ([id, times, last]) => row(cell(clip(...account(name, id))), number(times), cell(whole(last))));
  fill('latest-of', made.latest, ({ sample, account: id }) => row(cell(whole(day(sample))),
    cell(clip(value(sample.BankEntryText))), number(value(sample.BankEntryAmount, 40)),
    cell(clip(...account(name, id)))));
}

/* A cell of a CSV file. A spreadsheet runs what begins so as a formula, but for a number. */
function csvCell(what) {
  const text = String(what ?? ''), isNumber = /^[-+]?\d[\d.,]*$/.test(text);
  return `"${/^[=+\-@\t\r]/.test(text) && !isNumber ? '\'' : ''}${text.replaceAll('"', '""')}"`;
}
function asCsv(log) {
  const rows = new Map(); // by seq
  for (const text of log.split('\n').filter(Boolean)) {
    const { seq, sample, predicted: Predicted, confidence: Confidence, reviewed: Reviewed = true,
      corrects, AccountNumber } = JSON.parse(text), row = rows.get(corrects);
    if (sample) rows.set(seq, { ...sample, Seq: seq, Predicted, Confidence, Reviewed });
    if (!row) continue;
    if (row.AccountNumber !== AccountNumber) {
      const AccountName = named(row.CompanyId, AccountNumber);
      Object.assign(row, { AccountNumber, AccountName, AccountTypeName: '' });
    }
    if (row.BookedBy === 'suggestion') row.BookedBy = 'person';
    row.Reviewed = true;
  }
  const columns = [...new Set([...rows.values()].flatMap(Object.keys))];
  const table = [...rows.values()].map((each) => columns.map((name) => each[name]));
  return [columns, ...table].map((each) => `${each.map(csvCell).join(',')}\r\n`);
}

on('download', 'click', () => telling($('own-said'), 'Asking for its bookings.', async () => {
  const name = company, file = `${name.replace(/[^\p{L}\p{N}_-]+/gu, '-').slice(0, 60)}.csv`;
  const log = await call(`samples?${asQuery({ company: name })}`, { text: true, timeout: LONG });
  const href = URL.createObjectURL(new Blob(['\ufeff', ...asCsv(log)], { type: 'text/csv' }));
  make('a', { href, download: file }).click();
  URL.revokeObjectURL(href);
  return `${file} is among your downloads.`;
}));
const typeable = (name) => name.replace(/[\s\p{C}]+/gu, ' ').trim() || 'forget';
const [, forgetIt] = $('forgetting').querySelectorAll('input, button');

on('forget', 'click', () => {
  $('forgetting-title').replaceChildren('Forget ', value(company, 60), '?');
  $('to-type').replaceChildren(value(typeable(company)));
  $('typed').value = '';
  forgetIt.disabled = true;
  put($('forget-said'), '');
  $('forgetting').showModal();
});
const isTyped = () => $('typed').value && typeable($('typed').value) === typeable(company);
on('typed', 'input', () => { forgetIt.disabled = !isTyped(); });
on('forgetting', 'submit', (event) => {
  event.preventDefault();
  telling($('forget-said'), 'Forgetting it.', async () => {
    const name = company, path = `company?id=${encodeURIComponent(name)}`;
    const { forgotten } = await call(path, { method: 'DELETE', timeout: LONG });
    companies.delete(name);
    remember(session.filter((change) => change.company !== name));
    $('forgetting').close();
    goTo('');
    say(`${count(forgotten)} bookings are forgotten.`);
    return '';
  });
});
document.addEventListener('click', ({ target }) =>
  target.closest('[data-close]')?.closest('dialog').close());
const goTo = (name) => { location.hash = asQuery({ company: name }); follow(); };

function follow() {
  const name = new URLSearchParams(location.hash.slice(1)).get('company') ?? '';
  $('company').value = name;
  if (name === company) return;
  company = name;
  $('forgetting').close();
  $('own').hidden = true;
  put($('own-said'), '');
  if (!health?.samples) return;
  load();
  showOwn();
  refresh();
}
addEventListener('hashchange', follow);
on('all', 'click', () => goTo(''));

let searched; // for companies, in the last bookings
const finder = new Completion('company', 'Companies', {
  found(text) {
    searched ??= readBack({}, () => {
      if (document.activeElement === $('company')) finder.open(finder.at);
      return companies.size >= health.companies;
    }).catch(() => { searched = null; });
    const found = fitting([...companies].sort(), text, (each) => [each]);
    return [...text ? [] : [['', 'all companies']], ...found.map((each) => [each, value(each)]),
      ...!text || companies.has(text) ? [] : [[text, value(text)]]];
  },
  choose: goTo,
  reset: () => { $('company').value = company; },
  leave: (text) => { if (text !== company.replace(/[\r\n]/g, '')) goTo(text); },
});

// --------------------------------------------------------------------------------------- The page
function show({ health: now, metrics, curve, scored, confidence: all, unknown }) {
  const confidence = now.samples < ENOUGH ? [] : all;
  showTrust(now, scored, confidence, unknown);
  for (const name of ['samples', 'accounts', 'companies']) put($(name), count(now[name]));
  for (const name of SCORES) put($(name), score(metrics?.[name]));
  put($('origin'), location.origin);
  const locked = sessionStorage.getItem('token') !== null;
  for (const node of document.querySelectorAll('.locked')) node.hidden = !locked;
  $('start').hidden = now.samples > 0;
  $('report').hidden = now.samples === 0;
  for (const node of document.querySelectorAll('[data-of]')) {
    node.hidden = !{ curve, confidence }[node.dataset.of].length !== node.matches('.none');
  }
  fill('steps', confidence, level);
  draw(points = curve);
  keepUp(now);
}
function level({ at_least: from, share, accuracy, error }) {
  const wrong = accuracy == null ? '–' : count(Math.round(1000 * share * (1 - accuracy)));
  const within = quiet(accuracy == null ? '' : ` ± ${percent(error)}`);
  return row(make('th', { scope: 'row', role: 'rowheader' }, percent(from, 0)),
    number(percent(share)), number(percent(accuracy), within), number(wrong));
}
function showTrust({ samples, unseen, checks: allChecks }, scored, confidence, unknown) {
  const checks = confidence[0]?.checks, each = checks > 1 ? 'checks, each of' : 'a check,';
  put($('checks'), `${count(scored)} bookings by a person`
    + (checks ? `, ${count(checks)} of them ${each} which stands for ${CHECKED}` : ''));
  const far = ({ at_least: from }) => Math.abs(from - 0.9);
  const [usual] = confidence.filter((x) => x.accuracy !== null).sort((x, y) => far(x) - far(y));
  if (usual) {
    put($('sentence'), `If it books by itself from ${percent(usual.at_least, 0)} confidence on: `
      + `${percent(usual.share)} of the bookings, ${percent(usual.accuracy)} ± `
      + `${percent(usual.error)} of them right.`);
  }
  checked = allChecks > 0;
  put($('none'), unknown ?? (samples < ENOUGH ? `Too early to say: this takes ${ENOUGH} bookings.`
    : `No prediction ${company && 'for this company '}could be compared with a person’s `
      + 'booking yet.'));
  $('none').classList.toggle('error', Boolean(unknown));
  put($('of-whom'), company ? `Of ${company.slice(0, 60)} only. ` : '');
  put($('unseen'), !unseen ? '' : `Nobody has looked at ${count(unseen)} of the bookings yet: `
    + `${unseen === 1 ? 'it is' : 'they are'} not learned.`);
}

follow();
refresh();
