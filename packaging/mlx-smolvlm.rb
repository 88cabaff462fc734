# Homebrew takes formulae from taps only, so make a tap of your clone (in its folder):
#
#   brew tap local/smolvlm "$PWD"
#   brew install local/smolvlm/mlx-smolvlm
#
# Newer versions of Homebrew ask you to say first that you trust it: brew trust local/smolvlm
class MlxSmolvlm < Formula
  desc "Run the SmolVLM family of vision-language models on a Mac, fully on-device"
  homepage "https://huggingface.co/HuggingFaceTB/SmolVLM2-2.2B-Instruct"
  url "file://#{File.dirname(File.realpath(__FILE__), 2)}", using: :git, branch: "main"
  version "0.1.0"
  license "Apache-2.0"

  depends_on arch: :arm64
  depends_on macos: :sonoma
  depends_on "python@3.13"

  def install
    libexec.install Dir["*"]
    (bin/"mlx-smolvlm").write <<~SH
      #!/bin/sh
      exec "#{libexec}/venv/bin/mlx-smolvlm" "$@"
    SH
  end

  # Not in `install`: Homebrew rewrites the names of the libraries that it leaves, and those of
  # wheels have no room for longer ones.
  def post_install
    rm_r libexec/"venv" if (libexec/"venv").exist?
    system Formula["python@3.13"].opt_bin/"python3.13", "-m", "venv", libexec/"venv"
    pip = [libexec/"venv/bin/python", "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check"]
    system(*pip, "--only-binary", ":all:", "--require-hashes",
           "--requirement", libexec/"packaging/requirements-macos.txt")
    system(*pip, "--no-deps", libexec)
  end

  test do
    picture = libexec/"examples/three.png"
    answer = shell_output("#{bin}/mlx-smolvlm chat --offline -i #{picture} 'Where is the square?'")
    assert_equal "At the top left.\n", answer
  end
end
