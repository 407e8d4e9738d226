// Questions on the image to vision-language models: a conversation with each, and the patches at which an answer looked.

import {fill, press, rove} from '/rove.js';
import {post, say} from '/talk.js';
import {drawChances, drawLooked, named, wordButtons} from '/words.js';

const $ = (query, within) => within.querySelector(query);

// A conversation of model `at` in `block`; `shown` says which image is shown and how the model sees it.
export class Chat {
  constructor(at, block, shown, of) {
    Object.assign(this, {at, shown, of, node: block.node, line: block.line});
    this.layer = $('select', this.node);
    this.busy = false;
    this.layer.onchange = () => this.relook();
    this.restart();
  }

  restart() {
    this.turns = [];
    this.chosen = null;
    $('.turns', this.node).replaceChildren();
    $('.word', this.node).replaceChildren();
    $('.looked', this.node).hidden = true;
    say($('.status', this.node), '');
  }

  async send(turns, text) {
    const texts = [...turns.flatMap((one) => [one.question, one.answer]), text], layer = this.layer.value;
    return {...await post('chat', {model: this.at, image: this.shown().image, layer}, JSON.stringify(texts)), at: layer};
  }

  // `failed` is called where there is no answer
  put(text, failed) {
    const {turns} = this;
    this.busy = true;
    this.line(async () => {
      try {
        const found = turns === this.turns && await this.send(turns, text);
        if (turns !== this.turns) return;  // another image, or started over
        turns.push({question: text, ...found});
        this.write(turns.at(-1));
      } catch (error) { failed(); throw error; } finally { this.busy = false; }
    });
  }

  write(turn) {
    const item = document.createElement('li'), asked = document.createElement('p'), said = document.createElement('p');
    asked.className = 'asked';
    asked.textContent = turn.question;
    said.className = 'caption';
    said.setAttribute('role', 'group');
    said.ariaLabel = `Tokens of the answer; the arrow keys move${this.of}`;
    item.append(asked, said);
    $('.turns', this.node).append(item);
    if (!turn.words.length) { said.append('(an empty answer)'); return; }
    const whole = document.createElement('button');
    whole.type = 'button';
    whole.className = 'end';
    whole.textContent = 'all';
    whole.ariaLabel = 'the whole answer';
    whole.onmouseenter = whole.onfocus = whole.onclick = () => this.choose(turn, null);
    turn.said = said;
    fill(said, [...wordButtons(turn.words, (place) => this.choose(turn, place)), whole]);
    whole.classList.add('spaced');
    if (turn.limit) said.append(` … cut at ${turn.limit} tokens`);
    rove(said);
    while (this.layer.length <= turn.layers) this.layer.append(new Option(`layer ${this.layer.length - 1}`, this.layer.length - 1));
    this.choose(turn, null);
  }

  choose(turn, place) {
    this.chosen = {turn, place};
    if (turn.at !== this.layer.value) this.relook();
    this.draw();
  }

  relook() { if (!this.busy) this.line(() => this.look()); }  // a question that waits is not replaced

  // the chosen answer's attention in the chosen layer
  async look() {
    const {turns, chosen} = this;
    if (!chosen) return;
    const found = await this.send(turns.slice(0, turns.indexOf(chosen.turn)), chosen.turn.question);
    if (turns !== this.turns) return;
    Object.assign(chosen.turn, found);
    this.draw();
  }

  draw() {
    const {turn, place} = this.chosen, {words} = turn, word = words[place];
    for (const other of this.turns) if (other.said) press(other.said, other === turn ? other.said.children[place ?? words.length] : null);
    if (word) drawChances($('.word', this.node), word); else $('.word', this.node).replaceChildren();
    $('.looked', this.node).hidden = !turn.layers;
    if (!turn.layers) return say($('.status', this.node), 'Of this language model no attention is known.');
    const mean = (pick) => words.reduce((sum, one) => sum + pick(one), 0) / words.length;
    const attention = word ? word.attention : words[0].attention.map((row, r) => row.map((_, c) => mean((one) => one.attention[r][c])));
    const where = turn.at === 'all' ? 'mean over layers and heads' : `layer ${turn.at}, mean over heads`;
    const what = word ? `Attention where ${named(word.text)} was chosen` : 'Attention over the whole answer, mean over its tokens';
    drawLooked($('.looked', this.node), this.shown().view, {attention, share: word ? word.share : mean((one) => one.share)}, `${what} (${where})`, this.of);
  }
}
