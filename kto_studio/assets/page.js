// The page's frame, loaded once by the header: the tab in the address, the theme, the title, names for groups.

// ---- the tab is kept in the address, so that a reload, a bookmark and Back come to it
const open = () => {
  const button = document.getElementById(`tab-${location.hash.slice(1)}-button`);
  if (button?.ariaSelected === 'false') button.click();
};
const note = () => {
  const name = document.querySelector('#tabs > * > [role=tablist] > [aria-selected=true]')?.dataset.tabId;
  if (name && `#${name}` !== location.hash) history.replaceState(history.state, '', `${location.search}#${name}`);
};
window.addEventListener('hashchange', open);

// ---- light or dark: what was chosen here, else what the system has
const KEPT = 'kto-studio-theme';
const toggle = element.querySelector('.theme-toggle');
const dark = () => document.body.classList.contains('dark');
const paint = wanted => {
  document.body.classList.toggle('dark', wanted);
  const name = wanted ? 'Light theme' : 'Dark theme';
  toggle.setAttribute('aria-label', name);
  toggle.title = name;
};
paint(localStorage.getItem(KEPT) ? localStorage.getItem(KEPT) === 'dark' : dark());
toggle.addEventListener('click', () => {
  paint(!dark());
  localStorage.setItem(KEPT, dark() ? 'dark' : 'light');
});

// ---- the window's title has the percent of the run
const title = () => {
  const wanted = document.querySelector('.header-status')?.dataset.title;
  if (wanted && document.title !== wanted) document.title = wanted;
};

// ---- Gradio gives a group of choices no name, and each radio button a group of its own
const groups = () => {
  for (const group of document.querySelectorAll('fieldset:not([aria-label])')) {
    const label = group.querySelector('[data-testid=block-info]')?.textContent.trim();
    if (!label) continue;
    const radios = group.querySelectorAll('input[type=radio]');
    group.setAttribute('aria-label', label);
    if (radios.length) group.setAttribute('role', 'radiogroup');
    for (const radio of radios) radio.name = radios[0].name; // one Tab stop, arrows inside
  }
};

// ---- help of a field: read with it, and shown where Tab comes to it
const helped = () => {
  for (const help of document.querySelectorAll('.info-text:not([id])')) {
    help.id = `help-${count++}`;
    for (const field of help.closest('.block').querySelectorAll('input:not([type=radio]), textarea'))
      field.setAttribute('aria-describedby', help.id);
  }
};
let count = 0;
document.addEventListener('keydown', event => { if (event.key === 'Tab') document.body.dataset.keys = ''; });
document.addEventListener('pointerdown', () => delete document.body.dataset.keys);

// ---- a dropdown that Tab comes to stays closed (an arrow opens it), and one that is left closes
const close = field => {
  if (field.ariaExpanded === 'true') field.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}));
};
document.addEventListener('focusin', event => {
  if (event.target.role === 'combobox' && 'keys' in document.body.dataset) setTimeout(close, 30, event.target);
});
document.addEventListener('focusout', event => {
  const field = event.target; // later: a press on one of its options takes the focus too
  if (field.role === 'combobox') setTimeout(() => document.activeElement !== field && close(field), 250);
});

// ---- a setting that a problem names is marked
const marked = () => {
  const wrong = (document.querySelector('#train-plan [data-fields]')?.dataset.fields ?? '').split(' ');
  for (const field of document.querySelectorAll('#train-form [id^=set-] :is(input, textarea)'))
    field.ariaInvalid = wrong.includes(field.closest('[id^=set-]').id.slice(4)) ? 'true' : null;
};

let tabs = null, waiting = false;
function look() {
  waiting = false;
  groups();
  helped();
  marked();
  title();
  const found = document.querySelector('#tabs [role=tablist]');
  if (!found || found === tabs) return;
  tabs = found;
  open();
  new MutationObserver(note).observe(tabs, {attributes: true, subtree: true, attributeFilter: ['aria-selected']});
}
new MutationObserver(() => {
  if (!waiting) setTimeout(look, 200);
  waiting = true;
}).observe(document.body, {childList: true, subtree: true});
look();
