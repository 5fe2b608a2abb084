// A conversation with versions: a message may be followed by several, of which one is chosen.
export class Branches {
  root = { followers: [], chosen: -1 };

  // A new version of what follows `parent`, and the one that is chosen from now on.
  add(parent, message) {
    const node = { ...message, parent, followers: [], chosen: -1 };
    parent.chosen = parent.followers.push(node) - 1;
    return node;
  }

  // The messages that are chosen, from the first to the last.
  path() {
    const nodes = [];
    for (let node = this.root.followers[this.root.chosen]; node; node = node.followers[node.chosen]) nodes.push(node);
    return nodes;
  }

  last() {
    return this.path().at(-1) ?? this.root;
  }

  // Which version of its place a message is, from 1, and of how many.
  place(node) {
    return [node.parent.followers.indexOf(node) + 1, node.parent.followers.length];
  }

  // Chooses the version that many further, and gives it back; nothing where there is none.
  move(node, step) {
    const index = node.parent.followers.indexOf(node) + step;
    if (!node.parent.followers[index]) return null;
    node.parent.chosen = index;
    return node.parent.followers[index];
  }

  // What was said until `node`, in a request's words. Questions that nobody answered are left out.
  said(node) {
    const messages = [];
    for (let one = node; one !== this.root; one = one.parent) {
      if (one.role === "assistant" && !one.content) one = one.parent;
      else messages.unshift({ role: one.role, content: one.content });
    }
    return messages;
  }
}
