// What a pointer does on the curves in `element`: the values at a step, and a range to zoom into.
// The server draws (kto_studio/shared/curves.py) and replaces the figures whenever there is a new point, so what is
// under way is kept here, by the figure's id, and put on the new figure.
let dragged = null; // {id, from, to}: shares of the plot's width
let pointed = null; // {id, share}

const read = figure => (figure.told ??= JSON.parse(figure.dataset.curve));
const figureOf = event => event.target.closest?.('.curve-area')?.closest('.curve');
const shareOf = (figure, event) => {
  const box = figure.querySelector('svg').getBoundingClientRect();
  return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
};
const toValue = (figure, share) => {
  const [low, high] = read(figure).range;
  return low + share * (high - low);
};

function nearest(places, value) {
  let best = 0;
  for (let i = 1; i < places.length; i++)
    if (Math.abs(places[i] - value) < Math.abs(places[best] - value)) best = i;
  return best;
}

function tip(figure, share) {
  const box = figure.querySelector('.curve-tip'), told = read(figure), value = toValue(figure, share);
  const rows = told.lines.filter(line => line[2].length).map(([name, color, places, values, xs]) => {
    const i = nearest(places, value);
    return {name, color, text: values[i], x: xs[i], off: Math.abs(places[i] - value)};
  });
  if (!rows.length) return;
  const x = rows.reduce((a, b) => (b.off < a.off ? b : a)).x;
  const head = document.createElement('div');
  head.textContent = `${told.x} ${x}`;
  const lines = rows.map(row => {
    const line = document.createElement('div'), mark = document.createElement('i'), number = document.createElement('b');
    mark.style.background = row.color;
    number.textContent = row.text;
    line.append(mark, `${row.name} `, number, row.x === x ? '' : ` at ${row.x}`);
    return line;
  });
  box.replaceChildren(head, ...lines);
  box.classList.toggle('left', share > 0.5);
  box.style.left = `${100 * share}%`;
  box.hidden = false;
}

function show() {
  for (const figure of element.querySelectorAll('.curve')) {
    const band = figure.querySelector('.curve-band'), drag = dragged?.id === figure.id ? dragged : null;
    band.hidden = !drag;
    if (drag) {
      band.style.left = `${100 * Math.min(drag.from, drag.to)}%`;
      band.style.width = `${100 * Math.abs(drag.to - drag.from)}%`;
    }
    if (pointed?.id === figure.id) tip(figure, pointed.share);
    else figure.querySelector('.curve-tip').hidden = true;
  }
}

element.addEventListener('pointerdown', event => {
  const figure = figureOf(event);
  if (!figure || event.button || event.pointerType === 'touch') return; // a finger scrolls
  event.preventDefault();
  dragged = {id: figure.id, from: shareOf(figure, event), to: shareOf(figure, event)};
});
window.addEventListener('pointermove', event => {
  if (dragged) {
    const figure = document.getElementById(dragged.id);
    if (figure) dragged.to = shareOf(figure, event);
  }
  const figure = element.contains(event.target) ? figureOf(event) : null;
  const before = pointed;
  pointed = figure ? {id: figure.id, share: shareOf(figure, event)} : null;
  if (dragged || pointed || before) show();
});
window.addEventListener('pointerup', () => {
  const drag = dragged, figure = drag && document.getElementById(drag.id);
  dragged = null;
  if (!drag) return;
  const ends = [drag.from, drag.to].sort((a, b) => a - b);
  if (figure && ends[1] - ends[0] > 0.02) trigger('select', {index: ends.map(end => toValue(figure, end)), value: null});
  show();
});
window.addEventListener('pointercancel', () => { dragged = null; show(); });
const whole = () => trigger('select', {index: [], value: null});
element.addEventListener('dblclick', event => { if (figureOf(event)) whole(); });
element.addEventListener('click', event => { if (event.target.closest('.curve-reset')) whole(); });
new MutationObserver(changes => {
  if (changes.some(change => [...change.addedNodes].some(node => node.querySelector?.('.curve') || node.matches?.('.curve'))))
    show();
}).observe(element, {childList: true, subtree: true});
