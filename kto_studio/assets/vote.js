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

// ---- Chat or blind vote, as it was before a reload: Gradio may still undo a press while it fills the page
document.addEventListener('change', event => {
  if (event.target.closest?.('#chat-kind')) localStorage.setItem(KEPT, event.target.value);
});
let settled = 0;
const restoring = setInterval(() => {
  const wanted = [...document.querySelectorAll('#chat-kind input')].find(r => r.value === localStorage.getItem(KEPT));
  if (!localStorage.getItem(KEPT) || settled > 12) return clearInterval(restoring);
  if (!wanted) return;
  settled = wanted.checked ? settled + 1 : 0;
  if (!wanted.checked) wanted.click();
}, 250);
