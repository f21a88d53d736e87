// The table of runs: a press sorts, filters, turns the page or chooses. The whole view is sent, one at a time: answers
// may overtake each other, and Gradio's "always_last" would send the first event's data again.
const drawn = () => JSON.parse(element.querySelector('[data-view]')?.dataset.view ?? '{"chosen": [], "n": 0}');
let wanted = null; // the newest view that was asked for, until it is drawn
let sent = 0, at = 0; // the view that is on its way, and since when
let held = null; // what has the focus, found again when the table is drawn again under it
const now = () => wanted ?? drawn();
const send = () => {
  [sent, at] = [wanted.n, Date.now()];
  trigger('select', {index: JSON.stringify(wanted), value: null});
};
const ask = change => {
  wanted = {...now(), ...change, n: Math.max(now().n, sent) + 1};
  if (drawn().n >= sent || Date.now() - at > 5000) send();
};
const handle = node => {
  const {run, do: what, value} = node?.dataset ?? {};
  return run ? `input[data-run="${CSS.escape(run)}"]` : what ? `[data-do="${what}"][data-value="${CSS.escape(value)}"]` : null;
};

element.addEventListener('click', event => {
  const button = event.target.closest('button[data-do]');
  if (!button) return;
  const {do: what, value, down} = button.dataset;
  if (what === 'sort') ask({sort: value, down: now().sort === value ? !now().down : down === 'true', page: 1});
  if (what === 'page') ask({page: Number(value)});
  if (what === 'state' || what === 'tag') ask({[what]: now()[what] === value ? '' : value, page: 1});
  if (what === 'none') {
    ask({chosen: []});
    follow();
  }
  if (what === 'go') document.getElementById('runs-beside')?.scrollIntoView({behavior: 'smooth'});
});
element.addEventListener('change', event => {
  const run = event.target.closest('input[data-run]')?.dataset.run;
  if (!run) return;
  const others = now().chosen.filter(id => id !== run);
  const most = Number(element.querySelector('[data-most]').dataset.most);
  if (event.target.checked && others.length >= most) {
    element.querySelector('.place').textContent = `At most ${most} runs are compared.`;
    return;
  }
  ask({chosen: event.target.checked ? [...others, run] : others});
});
element.addEventListener('focusin', event => { held = handle(event.target.closest('[data-run], [data-do]')); });
element.addEventListener('focusout', event => setTimeout(() => { if (event.target.isConnected) held = null; }));
const follow = () => {
  const n = drawn().n;
  if (wanted && n >= wanted.n) wanted = null;
  else if (wanted && n >= sent) send();
  for (const box of element.querySelectorAll('input[data-run]')) {
    box.checked = now().chosen.includes(box.dataset.run);
    box.closest('tr').ariaSelected = String(box.checked);
  }
  for (const button of element.querySelectorAll('[data-do=none], [data-do=go]')) button.hidden = !now().chosen.length;
};
element.addEventListener('change', follow);
new MutationObserver(() => {
  follow();
  if (held && document.activeElement === document.body) element.querySelector(held)?.focus({preventScroll: true});
}).observe(element, {childList: true, subtree: true, attributes: true, attributeFilter: ['data-view', 'checked']}); // what is the same stays
