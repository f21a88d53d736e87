// The blind vote: arrow keys vote, and a reload comes back to what the tab was used for.
const KEPT = 'kto-studio-chat-kind';
const BUTTONS = {ArrowLeft: 'left', ArrowRight: 'right', ArrowDown: 'tie'};
// where an arrow has a meaning of its own, and where somebody writes
const OWN = 'input, textarea, select, [contenteditable=true], [role=tab], [role=radio], [role=combobox], [role=option], [role=slider]';

document.addEventListener('keydown', event => {
  const name = BUTTONS[event.key];
  if (!name || event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  if (event.target.closest?.(OWN)) return;
  const button = document.getElementById(`vote-choose-${name}`);
  if (!button || button.disabled || !button.offsetParent) return; // not shown: no pair waits, or another tab is open
  event.preventDefault();
  button.click();
});

const kinds = () => document.querySelectorAll('#chat-kind input[type=radio]');
const restore = () => {
  const radios = kinds();
  if (!radios.length) return setTimeout(restore, 100);
  for (const radio of radios) {
    if (radio.value === localStorage.getItem(KEPT) && !radio.checked) radio.click();
    radio.addEventListener('change', () => localStorage.setItem(KEPT, radio.value));
  }
};
restore();
