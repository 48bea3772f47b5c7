"""The few classes of Android that the sample names, over a folder: enough to compile and run it."""

from __future__ import annotations

from pathlib import Path

SOURCES = {
    "android/content/Context.java": """
package android.content;
import android.content.pm.PackageManager;
import android.content.res.AssetManager;
import java.io.File;
public abstract class Context {
  public abstract PackageManager getPackageManager();
  public abstract String getPackageName();
  public abstract File getNoBackupFilesDir();
  public abstract AssetManager getAssets();
}
""",
    "android/content/pm/PackageInfo.java": """
package android.content.pm;
public class PackageInfo { public long lastUpdateTime = 7; }
""",
    "android/content/pm/PackageManager.java": """
package android.content.pm;
public class PackageManager {
  public PackageInfo getPackageInfo(String name, int flags) { return new PackageInfo(); }
}
""",
    "android/content/res/AssetManager.java": """
package android.content.res;
import java.io.*;
public class AssetManager {
  private final File folder;
  public AssetManager(File folder) { this.folder = folder; }
  public String[] list(String path) throws IOException { return new File(folder, path).list(); }
  public InputStream open(String path) throws IOException {
    return new FileInputStream(new File(folder, path));
  }
}
""",
    # Arguments: the module's assets, a folder for files, a prompt, how many tokens.
    "Main.java": """
import android.content.Context;
import android.content.pm.PackageManager;
import android.content.res.AssetManager;
import java.io.File;
public class Main {
  public static void main(String[] given) throws Exception {
    Context context = new Context() {
      public PackageManager getPackageManager() { return new PackageManager(); }
      public String getPackageName() { return "org.example"; }
      public File getNoBackupFilesDir() { return new File(given[1]); }
      public AssetManager getAssets() { return new AssetManager(new File(given[0])); }
    };
    for (int turn = 0; turn < 2; ++turn) {  // the second time the files are there
      org.slmtvm.Model model = new org.slmtvm.Model(context, 1);
      System.out.write(model.complete(given[2], Integer.parseInt(given[3])).getBytes("UTF-8"));
      System.out.println();
      model.close();
      if (turn == 1) try { model.complete("x", 1); } catch (IllegalStateException closed) {
        System.out.println(closed.getMessage());
      }
    }
  }
}
""",
}


def write_stubs(folder: Path) -> list[Path]:
    """The sources in ``folder``."""
    made = []
    for name, text in SOURCES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        made.append(path)
    return made
